"""JSON text of others as a value; every fault of it is a ValueError. Knows nothing of what it should hold."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value. Raises ValueError for what is no JSON, not Unicode, nested too deeply or with a number too long."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply to be read") from None
