"""Numbers that cost a model or an endpoint to compute, kept by a digest of what they are of. Computes none itself.

One Parquet file (kind `scores`) for one thing that scores, replaced whole after every few rows: killed anywhere, the
next run goes on from there, and what is there is never computed again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ple_data.digests import text_digest
from ple_data.parquet import save_rows
from schemas.errors import DamagedError
from schemas.files import locked
from schemas.tables import read_metadata, read_table

ROWS_AT_ONCE = 256
"""Rows that are scored between two writes: what a kill can cost."""

Score = tuple[float, int | None]
"""A value, and the tokens it is a sum over (None for a reward)."""


def key_of(*parts: Any) -> str:
    """Digest of what is scored: texts, or lists of token ids."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:32]


def cached_scores(
    directory: Path, made_by: str, keys: Sequence[str], compute: Callable[[list[int]], Iterator[Score] | list[Score]]
) -> list[Score]:
    """One score for each key. `compute` is called with the places of those that are not there yet, a few at a time;
    equal keys are computed once.

    `made_by` names the reward model, or the policy with its number type. Raises LockedError while another process
    computes the same, DamagedError for a file that cannot be read.
    """
    path = directory / f"{text_digest(made_by)}.parquet"
    with locked(path.with_suffix(".lock")):
        known = _read(path, made_by) if path.exists() else {}
        first_place = {key: place for place, key in reversed(list(enumerate(keys)))}
        missing = [place for place, key in enumerate(keys) if key not in known and first_place[key] == place]
        for start in range(0, len(missing), ROWS_AT_ONCE):
            places = missing[start : start + ROWS_AT_ONCE]
            for place, score in zip(places, compute(places), strict=True):
                known[keys[place]] = score
            rows = [{"key": key, "value": value, "tokens": tokens} for key, (value, tokens) in known.items()]
            save_rows(path, "scores", rows, {"made_by": made_by})
    return [known[key] for key in keys]


def _read(path: Path, made_by: str) -> dict[str, Score]:
    with _advised(path):
        if read_metadata(path, "scores").get("made_by") != made_by:
            raise DamagedError(f"{path}: holds scores of something else")
        rows = read_table(path, "scores").to_pylist()
    return {row["key"]: (row["value"], row["tokens"]) for row in rows}


@contextmanager
def _advised(path: Path) -> Iterator[None]:
    try:
        yield
    except DamagedError as error:
        what = str(error).split(": restore it", 1)[0]
        raise DamagedError(f"{what}: remove {path}, and its numbers are computed anew") from error
