"""Known good responses, by query: from a file, from another column of the queries, or those that came with them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ple_data.evaluation.answers import Answers
from ple_data.evaluation.metrics import need_bleu
from ple_data.inputs.queries import load_queries
from ple_data.inputs.readers import FORMATS, Rows, read_rows
from schemas.errors import UsageError
from schemas.options import Reading

References = dict[str, str]
"""Reference by query id; queries without one, or with white space alone, are not in it."""


def load_references(where: str, source: str | None, how: Reading) -> References:
    """The references in a file with `id` and `reference`, or in a column of the queries at `source`, if there are any.

    Raises UsageError for a file or column that is not there or holds no text, or whose ids are those of no query.
    """
    need_bleu()
    if Path(where).suffix in FORMATS or Path(where).exists():
        found = _from_file(where)
        if source is not None:
            refuse_strangers(where, found, by_query_id(None, source, how))
        return _told(found)
    if source is None:
        raise UsageError(f"--references {where}: there is no such file, and a column needs --queries")
    rows = read_rows(source, how.split)
    if where not in rows.columns:
        raise UsageError(
            f"--references {where} is neither a file nor a column of {rows.source}, which has {', '.join(rows.columns)}"
        )
    return _told(by_query_id(optional_texts(rows, where), source, how))


def refuse_strangers(where: str, references: Mapping[str, Any], ids: Mapping[str, Any]) -> None:
    """Raise UsageError where no id of the references is that of a query."""
    if not references.keys() & ids.keys():
        raise UsageError(
            f"--references {where}: none of its ids is that of a query (ids there: {_some(references)}; queries: "
            f"{_some(ids)})"
        )


def references_beside(answers: Sequence[Answers]) -> list[References]:
    """By policy: the references that came with its queries, where it has none those of the others."""
    found = [_told({row["query_id"]: row["reference"] for row in each.rows}) for each in answers]
    others = {id: text for own in reversed(found) for id, text in own.items()}
    return [others | own for own in found]


def _told(references: Mapping[str, str | None]) -> References:
    return {id: text for id, text in references.items() if text and text.strip()}


def _some(ids: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, list(ids)[:3]))


def _from_file(where: str) -> dict[str, str | None]:
    rows = read_rows(where)
    id_column = next((name for name in ("id", "query_id") if name in rows.columns), None)
    if id_column is None or "reference" not in rows.columns:
        raise UsageError(
            f"--references {where} needs the columns id and reference; its columns are {', '.join(rows.columns)}"
        )
    ids = [str(row.get(id_column)) for row in rows.rows]
    found = dict(zip(ids, optional_texts(rows, "reference"), strict=True))
    if len(found) < len(ids):
        doubled = next(place for at, place in enumerate(rows.places) if ids[at] in ids[:at])
        raise UsageError(f"--references {where} {doubled}: its id stands there twice; every id may stand once")
    return found


def by_query_id(values: Sequence[str | None] | None, source: str, how: Reading) -> dict[str, str | None]:
    """Values of the rows of a query source (None: nothing), by the ids that its queries have."""
    found: dict[str, str | None] = {}
    for chat in (False, True):  # without an id column, the id of a dialogue depends on how the model takes it
        queries = load_queries(source, how, chat=chat).queries
        found |= {query.id: value for query, value in zip(queries, values or [None] * len(queries), strict=True)}
    return found


def optional_texts(rows: Rows, name: str) -> list[str | None]:
    """A column that holds a text or nothing in each row. Raises UsageError with the first row that holds neither."""
    values = [row.get(name) for row in rows.rows]
    for place, value in zip(rows.places, values, strict=True):
        if not isinstance(value, str | None):
            raise UsageError(f"{rows.source} {place}: {name} is {value!r}, which is no text; correct or remove it")
    return values
