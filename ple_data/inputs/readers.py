"""Rows from a file or the hub: Parquet, JSONL, JSON, CSV or a dataset id. Knows nothing of queries.

Every fault names the file and the line or row, and what to do.
"""

import codecs
import csv
import hashlib
import io
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from ple_data.common.extras import need
from schemas.errors import UsageError, first_line
from schemas.files import read_given
from schemas.json_text import parse_json

ROWS_AT_ONCE = 8192
"""Rows that are Python's objects at once, where a reader goes through a source part by part."""
LINES_AT_ONCE = 512
"""Lines of JSON that are parsed together, where nothing is wrong with them."""
DEEP = 50
"""Brackets in a line from which on it is looked at for how deep they nest."""
_Row = tuple[dict[str, Any], str]
"""A row and its place."""
_BETWEEN = b",%d," % secrets.randbits(62)
_ODD = re.compile(rb"\\u[dD][89a-fA-F]")
"""An escape that may be half of a surrogate pair."""
_HUB_ID = re.compile(r"^[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?$")


@dataclass(frozen=True)
class Rows:
    """The rows of one source, or some of them, its columns, and how to call a row in a message ('line 7', 'row 7')."""

    source: str
    digest: str
    columns: tuple[str, ...]
    rows: Sequence[dict[str, Any]]
    places: Sequence[str]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Source:
    """A source of rows, read anew by each call of `parts`."""

    name: str
    digest: str
    _read: Callable[[], Iterable[_Row]]

    def parts(self) -> Iterator[Rows]:
        """The rows in their order, some thousand at a time, each part with its own columns. Raises UsageError."""
        rows = iter(self._read())
        while part := list(islice(rows, ROWS_AT_ONCE)):
            found, places = zip(*part, strict=True)
            yield Rows(self.name, self.digest, columns_of(found), found, places)


def columns_of(rows: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """All columns of rows, in the order in which they come."""
    return tuple(dict.fromkeys(chain.from_iterable(rows)))


def read_rows(source: str | Path, split: str | None = None) -> Rows:
    """All rows of what `open_rows` takes. Raises UsageError."""
    opened = open_rows(source, split)
    parts = list(opened.parts())
    rows, places = ([each for part in parts for each in getattr(part, name)] for name in ("rows", "places"))
    return Rows(opened.name, opened.digest, columns_of(part.columns for part in parts), rows, places)


def open_rows(source: str | Path, split: str | None = None) -> Source:
    """A Parquet, JSONL, JSON or CSV file, or a hub dataset `owner/name[:configuration]`.

    split: which split of a hub dataset, `train` if not given; refused for a file. Raises UsageError.
    """
    if not is_file(source):
        return _hub(str(source), split or "train")
    path = Path(source)
    if split is not None:
        raise UsageError(f"--split is for a hub dataset; {source} is a file")
    if path.suffix not in FORMATS:
        raise UsageError(f"{source} has an unknown format {path.suffix!r}; known are {', '.join(FORMATS)}")
    content = read_given(path, mark=b"")
    if not content:
        raise UsageError(f"{source} is empty")
    text, read = content.removeprefix(codecs.BOM_UTF8), FORMATS[path.suffix]
    if next(iter(read(path, text)), None) is None:
        raise UsageError(f"{source} has no rows")
    return Source(str(source), hashlib.sha256(content).hexdigest(), lambda: read(path, text))


def is_file(source: str | Path) -> bool:
    """Whether a source is a file here, else it may be a hub dataset. Raises UsageError where it can be neither."""
    path = Path(source)
    if os.path.isdir(path):
        raise UsageError(f"{source} is a directory; give one file of it ({', '.join(FORMATS)})")
    if os.path.exists(path):  # False for what is too long to be a path
        return True
    if path.suffix in FORMATS or not _HUB_ID.match(str(source)) or str(source).startswith("."):
        raise UsageError(f"{source} does not exist; give a file ({', '.join(FORMATS)}) or a hub dataset id")
    return False


def _parquet(path: Path, content: bytes) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(pa.BufferReader(content)).read()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UsageError(f"{path} is no whole Parquet file: {first_line(error)}") from error
    for start in range(0, len(table), ROWS_AT_ONCE):
        part, columns = table.slice(start, ROWS_AT_ONCE), {}
        for name, column in zip(part.column_names, part.columns, strict=True):
            try:
                columns[name] = column.to_pylist()
            except Exception as error:  # a date after the year 9999, a time zone that does not exist, no UTF-8
                what = f"column {name} holds what Python does not ({first_line(error)})"
                raise UsageError(f"{path}: {what}; correct or remove the column") from error
        for number, values in enumerate(zip(*columns.values(), strict=True), start=start + 1):
            yield dict(zip(columns, values, strict=True)), f"row {number}"


def _jsonl(path: Path, content: bytes) -> Iterator[_Row]:
    lines = (line for ended in io.BytesIO(content) for line in ended.splitlines())
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    while part := list(islice(numbered, LINES_AT_ONCE)):
        rows = _together([line for _, line in part]) or [_line(line, path, number) for number, line in part]
        for (number, _), row in zip(part, rows, strict=True):
            yield row, f"line {number}"


def _together(lines: list[bytes]) -> list[dict[str, Any]] | None:
    """What each line is by itself, in a quarter of the time; None where one needs a closer look.

    Between them stands a number that no file can know: where a line is broken, the next one cannot mend it.
    """
    text = b"[" + _BETWEEN.join(lines) + b"]"
    if (
        _ODD.search(text)
        or codecs.BOM_UTF8 in text
        or any(line.count(b"[") + line.count(b"{") > DEEP for line in lines)
    ):
        return None
    try:
        found = parse_json(text.decode())
    except ValueError:
        return None
    rows: list[dict[str, Any]] = found[::2]
    return rows if len(found) == 2 * len(lines) - 1 and all(isinstance(row, dict) for row in rows) else None


def _line(line: bytes, path: Path, number: int) -> dict[str, Any]:
    row: dict[str, Any] = _parsed(line, path, number)
    _check(row, f"{path} line {number}")
    return row


def _json(path: Path, content: bytes) -> Iterator[_Row]:
    """A JSON array of objects; a file of one object a line is read as JSONL."""
    if not content.lstrip().startswith(b"["):
        yield from _jsonl(path, content)
        return
    for number, row in enumerate(_parsed(content, path), start=1):
        _check(row, f"{path} row {number}")
        yield row, f"row {number}"


def _parsed(text: bytes, path: Path, line: int | None = None) -> Any:
    """A JSON value; a file put together from others may have a byte order mark in front of any line."""
    try:
        return parse_json(text.removeprefix(codecs.BOM_UTF8).decode())
    except ValueError as error:
        place = f"{path} line {line}" if line else str(path)
        what = "a number of thousands of digits" if "int_max_str_digits" in str(error) else first_line(error)
        raise UsageError(f"{place} is no valid JSON: {what}; correct or remove it") from error


def _check(row: Any, place: str) -> None:
    r"""Raise UsageError for what is no object. JSON may hold half of a surrogate pair (`"\ud83d"`), which no tokenizer
    takes."""
    if not isinstance(row, dict):
        raise UsageError(f"{place} is a JSON {type(row).__name__}, not an object with fields")
    for column, value in row.items():
        try:
            json.dumps([column, value], ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            half = "holds half a character (a lone surrogate escape)"
            what = "is nested too deep" if isinstance(error, RecursionError) else half
            raise UsageError(f"{place}: column {column} {what}; correct or remove the row") from None


def _csv(path: Path, content: bytes) -> Iterator[_Row]:
    csv.field_size_limit(sys.maxsize)
    lines = 1
    try:
        reader = csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True)
        for row in reader:
            lines += 1
            if None in row or None in row.values():
                fields = len(reader.fieldnames or [])
                raise UsageError(f"{path} line {reader.line_num} does not have the {fields} fields of the header")
            yield row, f"line {reader.line_num}"
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{path} line {lines + 1} is no valid CSV: {error}") from error


def _hub(source: str, split: str) -> Source:
    need("datasets", f"{source} is no file here, and a hub dataset is loaded with")
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    try:
        dataset = load_dataset(name, configuration or None, split=split)
    except Exception as error:
        what = f"split {split!r} of the hub dataset {source} (and no such file exists)"
        raise UsageError(f"cannot load {what}: {first_line(error)}; check the name, or give a file") from error
    if not len(dataset):
        raise UsageError(f"split {split!r} of the hub dataset {source} has no rows")
    digest = hashlib.sha256(f"{source}/{split}/{dataset._fingerprint}".encode()).hexdigest()
    return Source(f"{source}/{split}", digest, lambda: _of_dataset(dataset))


def _of_dataset(dataset: Any) -> Iterator[_Row]:
    number = count(1)
    for part in dataset.iter(batch_size=ROWS_AT_ONCE):
        for values in zip(*part.values(), strict=True):
            yield dict(zip(part, values, strict=True)), f"row {next(number)}"


FORMATS = {".parquet": _parquet, ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv}
"""By suffix, what reads such a file."""
