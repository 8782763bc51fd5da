"""Known good responses, by query: from a file, from another column of the queries, or those that came with them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ple_data.answers import Answers
from ple_data.queries import load_queries
from ple_data.readers import FORMATS, Rows, read_rows
from schemas.errors import UsageError


def find_references(where: str | None, generation: Mapping[str, Any], answers: Sequence[Answers]) -> dict[str, str]:
    """Reference by query id; queries without one, or with white space alone, are left out.

    where: a file with `id` and `reference`, or a column of the queries; None takes what the answers' rows hold.
    Raises UsageError for a file or column that is not there or holds no text.
    """
    if where is None:
        found = {row["query_id"]: row["reference"] for each in reversed(answers) for row in each.rows}
    elif Path(where).suffix in FORMATS or Path(where).exists():
        found = _from_file(where)
    elif "queries" in generation:
        found = _from_column(where, generation)
    else:
        raise UsageError(f"--references {where}: there is no such file, and a column needs --queries")
    return {id: text for id, text in found.items() if text and text.strip()}


def _from_file(where: str) -> dict[str, str | None]:
    rows = read_rows(where)
    id_column = next((name for name in ("id", "query_id") if name in rows.columns), None)
    if id_column is None or "reference" not in rows.columns:
        raise UsageError(
            f"--references {where} needs the columns id and reference; its columns are {', '.join(rows.columns)}"
        )
    ids = [str(row.get(id_column)) for row in rows.rows]
    found = dict(zip(ids, _texts(rows, "reference"), strict=True))
    if len(found) < len(ids):
        doubled = next(place for at, place in enumerate(rows.places) if ids[at] in ids[:at])
        raise UsageError(f"--references {where} {doubled}: its id stands there twice; every id may stand once")
    return found


def _from_column(name: str, generation: Mapping[str, Any]) -> dict[str, str | None]:
    rows = read_rows(generation["queries"], generation.get("split"))
    if name not in rows.columns:
        raise UsageError(
            f"--references {name} is neither a file nor a column of {rows.source}, which has {', '.join(rows.columns)}"
        )
    return by_query_id(_texts(rows, name), generation)


def by_query_id(values: Sequence[str | None], generation: Mapping[str, Any]) -> dict[str, str | None]:
    """Values of the rows of a query source, by the ids that its queries have."""
    given = ("reader", "query_column", "prefix_words", "split")
    options = {option: generation[option] for option in given if generation.get(option) is not None}
    found: dict[str, str | None] = {}
    for chat in (False, True):  # without an id column, the id of a dialogue depends on how the model takes it
        queries = load_queries(generation["queries"], chat=chat, **options).queries
        found |= {query.id: value for query, value in zip(queries, values, strict=True)}
    return found


def _texts(rows: Rows, name: str) -> list[str | None]:
    values = [row.get(name) for row in rows.rows]
    for place, value in zip(rows.places, values, strict=True):
        if not isinstance(value, str | None):
            raise UsageError(f"{rows.source} {place}: {name} is {value!r}, which is no text; correct or remove it")
    return values
