"""Queries x from any source of rows: text, chat messages, and readers for HH, IMDb and TL;DR. Never tokenizes.

A query has an id that stays the same in every round and run: its `id` field, else a digest of its text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from ple_data.common.digests import json_digest, text_digest
from ple_data.common.uncollected import uncollected
from ple_data.inputs.chat import BESIDE, X, beyond_text, hh_messages, hh_turns, is_turns, to_text
from ple_data.inputs.readers import Rows, Source, columns_of, open_rows
from schemas.errors import UsageError
from schemas.options import Reading

TEXT_COLUMNS = ("x", "prompt")
DEFAULT_PREFIX_WORDS = 8
NAMED_ROWS = 10
"""How many faulty rows an error names."""

_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Query:
    """One query: x as text or as chat messages that end with a user turn; reference: a known good response."""

    id: str
    x: X
    reference: str | None = None


@dataclass(frozen=True)
class QuerySet:
    """Queries in the order of their source, with the SHA-256 that says which source it was.

    table: `id`, `x` as `to_text` writes it, `reference`. chats: each x is chat messages.
    """

    table: pl.DataFrame
    chats: bool
    source: str
    digest: str

    def __len__(self) -> int:
        return self.table.height

    def take(self, places: Sequence[int]) -> list[Query]:
        """The queries at these places."""
        rows = self.table[places].iter_rows()
        return [Query(id, json.loads(x) if self.chats else x, reference) for id, x, reference in rows]

    @property
    def queries(self) -> list[Query]:
        """All of them."""
        return self.take(range(len(self)))

    @property
    def asked_digest(self) -> str:
        """Digest of the ids and texts alone: a changed reference or column is the same question."""
        return json_digest([list(row) for row in self.table.select("id", "x").iter_rows()])


@uncollected()
def load_queries(source: str | Path, how: Reading | None = None, *, chat: bool = False) -> QuerySet:
    """Queries from a Parquet, JSONL, JSON or CSV file or a hub dataset id.

    reader: `auto` takes `query_column`, else `x`, else `prompt`, else chat `messages`; `hh` the dialogue up to the last
    `Assistant:` of `chosen` or `prompt`; `imdb` the first `prefix_words` words of `text`; `tldr` the `prompt`.
    chat: the model has a chat template, so `hh` gives messages instead of one text.
    Raises UsageError that names the rows where a query is empty, of a wrong type or has the id of another one.
    """
    how = how or Reading()
    opened = open_rows(source, how.split)
    first = next(opened.parts()).columns
    try:
        return _read(opened, first, how, chat)
    except UsageError:
        columns = columns_of(part.columns for part in opened.parts())
        if columns == first:
            raise
        return _read(opened, columns, how, chat)  # some came later


def _read(opened: Source, columns: tuple[str, ...], how: Reading, chat: bool) -> QuerySet:
    """The queries of a source that has these columns. Raises UsageError, also where it has others."""
    read = {"auto": _auto, "hh": _hh, "imdb": _imdb, "tldr": _tldr}[how.reader]
    tables, chats = [], False
    for rows in opened.parts():
        if more := set(rows.columns) - set(columns):
            raise UsageError(f"{rows.source} has more columns: {', '.join(more)}")
        if set(BESIDE) & set(rows.columns):
            for place, row in zip(rows.places, rows.rows, strict=True):
                refuse_beyond_text(f"{rows.source} {place}", None, row)
        found = read(_Part(replace(rows, columns=columns), how, chat))
        chats = not isinstance(found[0][0], str)
        said = [x if isinstance(x, str) else x[-1]["content"] for x, _ in found]
        if empty := [place for place, text in zip(rows.places, said, strict=True) if not text.strip()]:
            raise UsageError(f"{rows.source} has empty queries in {_named(empty)}; remove these rows")
        texts = [to_text(x) for x, _ in found]
        ids = _ids(rows) if "id" in columns else list(map(text_digest, texts))
        values = {"id": ids, "x": texts, "reference": [text for _, text in found], "place": rows.places}
        tables.append(pl.DataFrame(values, schema=dict.fromkeys(values, pl.String)))
    table = pl.concat(tables, rechunk=True)
    repeated = table.filter(pl.col("id").is_duplicated())
    if repeated.height and "id" in columns:
        places = [f"{place} (id {id})" for place, id in repeated.select("place", "id").iter_rows()]
        raise UsageError(f"{opened.name} has duplicate ids in {_named(places)}; every id may stand once")
    if repeated.height:
        times = pl.int_range(1, pl.len() + 1).over("id")
        again = pl.when(times > 1).then(pl.format("{}-{}", "id", times)).otherwise("id")
        table = table.with_columns(id=again)
    return QuerySet(table.drop("place"), chats, opened.name, opened.digest)


@dataclass(frozen=True)
class _Part:
    rows: Rows
    how: Reading
    chat: bool

    def column(self, *names: str) -> str:
        """The column to read: `query_column` where given, else the first of `names` that is there."""
        wanted = [self.how.query_column] if self.how.query_column else names
        found = next((name for name in wanted if name in self.rows.columns), None)
        if found is None:
            raise UsageError(
                f"{self.rows.source} has no column {' or '.join(wanted)}; its columns are "
                f"{', '.join(self.rows.columns)}; name one with --query-column"
            )
        return found

    def texts(self, column: str) -> list[str]:
        faults = [
            f"{place} ({_shown(row.get(column))})"
            for place, row in zip(self.rows.places, self.rows.rows, strict=True)
            if not isinstance(row.get(column), str)
        ]
        if faults:
            raise UsageError(f"{self.rows.source}: column {column} must be text, but is not in {_named(faults)}")
        return [row[column] for row in self.rows.rows]

    def references(self, *names: str) -> list[str | None]:
        column = next((name for name in names if name in self.rows.columns), None)
        values = [row.get(column) if column else None for row in self.rows.rows]
        return [value if isinstance(value, str) else None for value in values]


_Found = list[tuple[X, str | None]]


def _auto(source: _Part) -> _Found:
    columns = source.rows.columns
    if source.how.query_column in (None, "messages") and "messages" in columns and not set(TEXT_COLUMNS) & set(columns):
        return _messages(source)
    texts = source.texts(source.column(*TEXT_COLUMNS))
    return list(zip(texts, source.references("reference"), strict=True))


def _messages(source: _Part) -> _Found:
    """x = the messages up to the last user turn; an assistant turn after it is the reference."""
    found: _Found = []
    for place, row in zip(source.rows.places, source.rows.rows, strict=True):
        messages = row.get("messages")
        refuse_beyond_text(f"{source.rows.source} {place}", messages, row)
        if not is_turns(messages) or not any(turn["role"] == "user" for turn in messages):
            raise UsageError(
                f"{source.rows.source} {place}: messages must be a list of role and content, with a user turn, "
                f"but is {_shown(messages)}"
            )
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
        end = 1 + max(index for index, turn in enumerate(turns) if turn["role"] == "user")
        reference = turns[end]["content"] if end < len(turns) else row.get("reference")
        if not isinstance(reference, str | None):
            raise UsageError(f"{source.rows.source} {place}: reference must be text, but is {_shown(reference)}")
        found.append((turns[:end], reference))
    return found


def refuse_beyond_text(place: str, messages: Any, row: Mapping[str, Any]) -> None:
    """Raise UsageError where messages or their row carry tools, images or the like: they would be left out unsaid."""
    if found := beyond_text(messages, row):
        raise UsageError(f"{place} has {found}: prompts are text alone, without tools or images; remove the row")


def _hh(source: _Part) -> _Found:
    """x = the dialogue up to and including the last `Assistant:`, which is added where a Human turn is the last; what
    follows it in `chosen` is the reference: as it stands, or without the white space around it where the model takes
    messages.
    """
    column = source.column("prompt", "chosen")
    answers = source.references("chosen") if column != "chosen" else [None] * len(source.rows)
    found: _Found = []
    for place, text, answer in zip(source.rows.places, source.texts(column), answers, strict=True):
        text, turns = hh_turns(text)
        if not turns or turns[0].group(1) != "Human":
            raise UsageError(
                f"{source.rows.source} {place}: column {column} must be a dialogue of 'Human:' and 'Assistant:' "
                f"turns, but is {_shown(text)}"
            )
        end = turns[-1].end()
        x, said = text[:end], text[end:]
        if turns[-1].group(1) == "Human":
            x, said = f"{text.rstrip()}\n\nAssistant:", ""
        reference = said if said.strip() else answer and answer.removeprefix(x)
        found.append((hh_messages(x), reference and reference.strip()) if source.chat else (x, reference))
    return found


def _imdb(source: _Part) -> _Found:
    """x = the first words of a review, as they stand; the rest of the review is the reference."""
    found: _Found = []
    for text in source.texts(source.column("text", *TEXT_COLUMNS)):
        words = [match.end() for match in _WORD.finditer(text)][: source.how.prefix_words or DEFAULT_PREFIX_WORDS]
        end = words[-1] if words else 0
        found.append((text[:end], text[end:] or None))
    return found


def _tldr(source: _Part) -> _Found:
    texts = source.texts(source.column("prompt"))
    return list(zip(texts, source.references("summary", "label", "reference"), strict=True))


def _ids(rows: Rows) -> list[str]:
    """The `id` column as text."""
    if missing := [place for place, row in zip(rows.places, rows.rows, strict=True) if row.get("id") in (None, "")]:
        raise UsageError(f"{rows.source} has no id in {_named(missing)}; give every row one, or drop the column")
    if odd := [p for p, row in zip(rows.places, rows.rows, strict=True) if row["id"] != row["id"]]:
        raise UsageError(f"{rows.source} has an id that is no number (NaN) in {_named(odd)}; give every row its own")
    return [str(row["id"]) for row in rows.rows]


def _named(places: list[str]) -> str:
    more = len(places) - NAMED_ROWS
    return ", ".join(places[:NAMED_ROWS]) + (f" and {more} more" if more > 0 else "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
