"""Rows from a file or the hub: Parquet, JSONL, JSON, CSV or a dataset id. Knows nothing of queries.

Every fault names the file and the line or row, and what to do.
"""

import csv
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ple_data.common.extras import need
from schemas.errors import UsageError, first_line
from schemas.files import sha256_file
from schemas.json_text import parse_json

_Found = tuple[list[dict[str, Any]], list[str]]
"""The rows of a file, and their places."""
_HUB_ID = re.compile(r"^[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?$")


@dataclass(frozen=True)
class Rows:
    """The rows of one source, its columns, and how to call a row in a message ('line 7', 'row 7')."""

    source: str
    digest: str
    columns: tuple[str, ...]
    rows: Sequence[dict[str, Any]]
    places: Sequence[str]

    def __len__(self) -> int:
        return len(self.rows)


def read_rows(source: str | Path, split: str | None = None) -> Rows:
    """All rows of a Parquet, JSONL, JSON or CSV file, or of a hub dataset `owner/name[:configuration]`.

    split: which split of a hub dataset, `train` if not given; refused for a file. Raises UsageError.
    """
    path = Path(source)
    if path.is_dir():
        raise UsageError(f"{source} is a directory; give one file of it ({', '.join(FORMATS)})")
    if not path.exists():
        if path.suffix in FORMATS or not _HUB_ID.match(str(source)) or str(source).startswith("."):
            raise UsageError(f"{source} does not exist; give a file ({', '.join(FORMATS)}) or a hub dataset id")
        return _hub(str(source), split or "train")
    if split is not None:
        raise UsageError(f"--split is for a hub dataset; {source} is a file")
    if path.suffix not in FORMATS:
        raise UsageError(f"{source} has an unknown format {path.suffix!r}; known are {', '.join(FORMATS)}")
    if path.stat().st_size == 0:
        raise UsageError(f"{source} is empty")
    rows, places = FORMATS[path.suffix](path)
    if not rows:
        raise UsageError(f"{source} has no rows")
    columns = tuple(dict.fromkeys(column for row in rows for column in row))
    return Rows(str(source), sha256_file(path), columns, rows, places)


def _parquet(path: Path) -> _Found:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.ParquetFile(path).read().to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"{path} is no whole Parquet file: {error}") from error
    return rows, _numbered(rows)


def _jsonl(path: Path) -> _Found:
    rows, places = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as error:
            raise UsageError(f"{path} line {number} is no valid JSON: {error}; correct or remove the line") from error
        rows.append(_checked(row, f"{path} line {number}"))
        places.append(f"line {number}")
    return rows, places


def _json(path: Path) -> _Found:
    """A JSON array of objects; a file of one object a line is read as JSONL."""
    content = path.read_bytes()
    if not content.lstrip().startswith(b"["):
        return _jsonl(path)
    try:
        rows = parse_json(content)
    except ValueError as error:
        raise UsageError(f"{path} is no valid JSON: {error}") from error
    places = _numbered(rows)
    return [_checked(row, f"{path} {place}") for row, place in zip(rows, places, strict=True)], places


def _checked(row: Any, place: str) -> dict[str, Any]:
    r"""The row, if it is an object. JSON may hold half of a surrogate pair (`"\ud83d"`), which no tokenizer takes."""
    if not isinstance(row, dict):
        raise UsageError(f"{place} is a JSON {type(row).__name__}, not an object with fields")
    for column, value in row.items():
        try:
            json.dumps([column, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{place}: column {column} holds half a character (a lone surrogate escape); correct or remove the row"
            ) from None
    return row


def _csv(path: Path) -> _Found:
    csv.field_size_limit(sys.maxsize)
    rows, places = [], []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    fields = len(reader.fieldnames or [])
                    raise UsageError(f"{path} line {reader.line_num} does not have the {fields} fields of the header")
                rows.append(row)
                places.append(f"line {reader.line_num}")
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{path} line {len(rows) + 2} is no valid CSV: {error}") from error
    return rows, places


def _hub(source: str, split: str) -> Rows:
    need("datasets", f"{source} is no file here, and a hub dataset is loaded with")
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    try:
        dataset = load_dataset(name, configuration or None, split=split)
    except Exception as error:
        what = f"split {split!r} of the hub dataset {source} (and no such file exists)"
        raise UsageError(f"cannot load {what}: {first_line(error)}") from error
    rows = dataset.to_list()
    if not rows:
        raise UsageError(f"split {split!r} of the hub dataset {source} has no rows")
    digest = hashlib.sha256(f"{source}/{split}/{dataset._fingerprint}".encode()).hexdigest()
    return Rows(f"{source}/{split}", digest, tuple(dataset.column_names), rows, _numbered(rows))


def _numbered(rows: Sequence[Any]) -> list[str]:
    return [f"row {number}" for number in range(1, len(rows) + 1)]


FORMATS = {".parquet": _parquet, ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv}
"""By suffix, what reads such a file."""
