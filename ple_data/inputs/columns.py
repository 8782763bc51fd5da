"""Columns of rows that a command was given: every value there and of its type, or the first that is not, named."""

from typing import Any

from ple_data.inputs.readers import Rows
from schemas.errors import UsageError

PREFERENCES = ("prompt", "chosen", "rejected")


def column(rows: Rows, *names: str, of: type | tuple[type, ...] = str) -> list[Any]:
    """The first of the columns `names` that there is, every value of type `of`.

    Raises UsageError where there is none, or that names the first row without a value or with one of another type.
    """
    name = next((name for name in names if name in rows.columns), None)
    if name is None:
        raise UsageError(f"{rows.source} has no column {' or '.join(names)}; it has {', '.join(rows.columns)}")
    values = [row.get(name) for row in rows.rows]
    for place, value in zip(rows.places, values, strict=True):
        if value is None:
            raise UsageError(f"{rows.source} {place}: {name} is missing; fill or remove the row")
        if not isinstance(value, of):
            raise UsageError(f"{rows.source} {place}: {name} is {value!r}, which is no text; correct or remove the row")
    return values


def labels(rows: Rows) -> list[int]:
    """The column `label` as numbers from 0 up; a CSV file holds them as text. Raises UsageError."""
    if "label" not in rows.columns:
        raise UsageError(
            f"{rows.source} needs columns text, label or prompt, chosen, rejected; it has {', '.join(rows.columns)}"
        )
    found = zip(rows.places, column(rows, "label", of=object), strict=True)
    return [_label(label, f"{rows.source} {place}") for place, label in found]


def _label(value: Any, place: str) -> int:
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    if not isinstance(value, int) or value < 0:
        raise UsageError(f"{place}: label {value!r} is not a whole number from 0 up; correct it")
    return value
