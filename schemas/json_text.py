"""JSON text of others as a value; every fault of it is a ValueError. Knows nothing of what it should hold."""

import json
from collections.abc import Iterable
from typing import Any

from schemas.errors import UsageError


def parse_json(text: str | bytes) -> Any:
    """The value. Raises ValueError for what is no JSON, not Unicode, nested too deeply or with a number too long."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply to be read") from None


def named_values(texts: Iterable[str], option: str) -> dict[str, Any]:
    """`name=value` texts as a dictionary; a value is JSON where it can be read as such (also True, False, None).

    Raises UsageError, which names the option.
    """
    words = {"True": True, "False": False, "None": None}
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise UsageError(f"{option} {text!r} must be name=value")
        try:
            found[name.replace("-", "_")] = words[value] if value in words else parse_json(value)
        except ValueError:
            found[name.replace("-", "_")] = value
    return found
