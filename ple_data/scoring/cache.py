"""Numbers that cost a model or an endpoint to compute, kept by a digest of what they are of. Computes none itself.

One Parquet file (kind `scores`) for one thing that scores. It is replaced whole every few seconds, at the end and when
something fails. The next run goes on from there: what is there is never computed again.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ple_data.common.digests import text_digest
from ple_data.common.finite import refuse_non_finite
from ple_data.common.progress import Progress
from ple_data.storage.parquet import save_rows
from schemas.errors import DamagedError, NewerError
from schemas.files import locked, refuse_outside
from schemas.tables import read_metadata, read_table

ROWS_AT_ONCE = 1024
"""Rows that `compute` is given together, so that it can batch them by length."""
SECONDS_BETWEEN_SAVES = 10.0
"""What kill -9 can cost, beside the batch in work. A save writes all rows: after every N of them, they would cost the
square of the rows."""

Score = tuple[float, int | None]
"""A value, and the tokens it is a sum over (None for a reward)."""


def key_of(*parts: Any) -> str:
    """Digest of what is scored: texts, or lists of token ids."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:32]


def cached_scores(
    directory: Path,
    made_by: str,
    keys: Sequence[str],
    compute: Callable[[list[int]], Iterable[list[tuple[int, Score]]]],
    *,
    label: str,
    unit: str,
    names: Sequence[str],
) -> list[Score]:
    """One score for each key; equal keys are computed once.

    `compute` is called with the places of a few keys that are not there yet, and gives (index among them, score), some
    at a time; what it gave before it failed is kept. `made_by` names the reward model, or the policy with its number
    type; label, unit: of the progress; names: what messages call each key. Raises LockedError while another process
    computes the same, DamagedError for a file that cannot be read, PleError for a score that is not finite.
    """
    path = directory / f"{text_digest(made_by)}.parquet"
    refuse_outside(directory.parent, path)
    with locked(path.with_suffix(".lock")):
        known = _read(path, made_by) if path.exists() else {}
        first_place = {key: place for place, key in reversed(list(enumerate(keys)))}
        missing = [place for place, key in enumerate(keys) if key not in known and first_place[key] == place]
        parts = (missing[start : start + ROWS_AT_ONCE] for start in range(0, len(missing), ROWS_AT_ONCE))
        batches = ((places, batch) for places in parts for batch in compute(places))
        saved, last_save = len(known), time.monotonic()
        with Progress(label, len(first_place), unit, done=len(first_place) - len(missing)) as progress:
            try:
                for places, batch in batches:
                    refuse_non_finite(
                        f"{made_by} gave values that are not finite",
                        [(names[places[at]], value) for at, (value, _) in batch],
                        "correct it and run the same command again",
                    )
                    known |= {keys[places[at]]: score for at, score in batch}
                    progress.advance(len(batch))
                    if time.monotonic() - last_save >= SECONDS_BETWEEN_SAVES:
                        _save(path, made_by, known)
                        saved, last_save = len(known), time.monotonic()
            finally:
                if len(known) > saved:
                    _save(path, made_by, known)
    return [known[key] for key in keys]


def _save(path: Path, made_by: str, known: dict[str, Score]) -> None:
    rows = [{"key": key, "value": value, "tokens": tokens} for key, (value, tokens) in known.items()]
    save_rows(path, "scores", rows, {"made_by": made_by})


def _read(path: Path, made_by: str) -> dict[str, Score]:
    try:
        if read_metadata(path, "scores").get("made_by") != made_by:
            raise DamagedError(f"{path}: holds scores of something else")
        rows = read_table(path, "scores").to_pylist()
    except NewerError:
        raise
    except DamagedError as error:
        what = str(error).split(": restore it", 1)[0]
        raise DamagedError(f"{what}: remove {path}, and its numbers are computed anew") from error
    return {row["key"]: (row["value"], row["tokens"]) for row in rows}
