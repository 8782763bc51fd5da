"""Rows from a file or the hub: Parquet, JSONL, JSON, CSV or a dataset id. Knows nothing of queries.

Every fault names the file and the line or row, and what to do.
"""

import codecs
import csv
import hashlib
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ple_data.common.extras import need
from schemas.errors import UsageError, first_line
from schemas.files import read_given
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
    content = read_given(path, mark=b"")
    if not content:
        raise UsageError(f"{source} is empty")
    rows, places = FORMATS[path.suffix](path, content.removeprefix(codecs.BOM_UTF8))
    if not rows:
        raise UsageError(f"{source} has no rows")
    columns = tuple(dict.fromkeys(column for row in rows for column in row))
    return Rows(str(source), hashlib.sha256(content).hexdigest(), columns, rows, places)


def _parquet(path: Path, content: bytes) -> _Found:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(pa.BufferReader(content)).read()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UsageError(f"{path} is no whole Parquet file: {first_line(error)}") from error
    columns: dict[str, list[Any]] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            columns[name] = column.to_pylist()
        except Exception as error:  # a date after the year 9999, a time zone that does not exist, text that is no UTF-8
            what = f"column {name} holds what Python does not ({first_line(error)})"
            raise UsageError(f"{path}: {what}; correct or remove the column") from error
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return rows, _numbered(rows)


def _jsonl(path: Path, content: bytes) -> _Found:
    rows, places = [], []
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            rows.append(_checked(_parsed(line, f"{path} line {number}"), f"{path} line {number}"))
            places.append(f"line {number}")
    return rows, places


def _json(path: Path, content: bytes) -> _Found:
    """A JSON array of objects; a file of one object a line is read as JSONL."""
    if not content.lstrip().startswith(b"["):
        return _jsonl(path, content)
    rows = _parsed(content, str(path))
    places = _numbered(rows)
    return [_checked(row, f"{path} {place}") for row, place in zip(rows, places, strict=True)], places


def _parsed(text: bytes, place: str) -> Any:
    """A JSON value; a file put together from others may have a byte order mark in front of any line."""
    try:
        return parse_json(text.decode("utf-8-sig"))
    except ValueError as error:
        what = "a number of thousands of digits" if "int_max_str_digits" in str(error) else first_line(error)
        raise UsageError(f"{place} is no valid JSON: {what}; correct or remove it") from error


def _checked(row: Any, place: str) -> dict[str, Any]:
    r"""The row, if it is an object. JSON may hold half of a surrogate pair (`"\ud83d"`), which no tokenizer takes."""
    if not isinstance(row, dict):
        raise UsageError(f"{place} is a JSON {type(row).__name__}, not an object with fields")
    for column, value in row.items():
        try:
            json.dumps([column, value], ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            half = "holds half a character (a lone surrogate escape)"
            what = "is nested too deep" if isinstance(error, RecursionError) else half
            raise UsageError(f"{place}: column {column} {what}; correct or remove the row") from None
    return row


def _csv(path: Path, content: bytes) -> _Found:
    csv.field_size_limit(sys.maxsize)
    rows, places = [], []
    try:
        reader = csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True)
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
        rows = dataset.to_list()
    except Exception as error:
        what = f"split {split!r} of the hub dataset {source} (and no such file exists)"
        raise UsageError(f"cannot load {what}: {first_line(error)}") from error
    if not rows:
        raise UsageError(f"split {split!r} of the hub dataset {source} has no rows")
    digest = hashlib.sha256(f"{source}/{split}/{dataset._fingerprint}".encode()).hexdigest()
    return Rows(f"{source}/{split}", digest, tuple(dataset.column_names), rows, _numbered(rows))


def _numbered(rows: Sequence[Any]) -> list[str]:
    return [f"row {number}" for number in range(1, len(rows) + 1)]


FORMATS = {".parquet": _parquet, ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv}
"""By suffix, what reads such a file."""
