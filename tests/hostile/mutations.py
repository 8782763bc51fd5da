"""Small changes that make a good file a hostile one: of JSON values, of text, of bytes."""

import json
from collections.abc import Iterator
from typing import Any

VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "-1": -1,
    "huge": 10**30,
    "1e308": 1e308,
    "fraction": 0.5,
    "text": "x",
    "empty": "",
    "up": "../neighbour/kept.txt",
    "absolute": "/etc/passwd",
    "escape": "\x1b[31mred\u202e",
    "nul": "a\x00b",
    "lone surrogate": "\ud800",
    "long": "x" * 100_000,
    "list": [],
    "object": {},
    "nested": [[[[[[[[[[]]]]]]]]]],
}
RAW = {
    "NaN": "NaN",
    "Infinity": "Infinity",
    "1e999": "1e999",
    "9" * 20: "9" * 20,
    "5,000 digits": "9" * 5000,
    "deep": "[" * 100_000 + "]" * 100_000,
}
"""JSON texts that no Python value writes."""
MARK = "@@hostile@@"


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a JSON value, and of the value itself."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for at, item in enumerate(value[:2]):
            yield from places(item, (*path, at))


def put(value: Any, path: tuple, new: Any) -> Any:
    """A copy of a JSON value with another value at a path."""
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = put(copied[path[0]], path[1:], new)
    return copied


def without(value: Any, path: tuple) -> Any:
    copied = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1:
        del copied[path[0]]
    else:
        copied[path[0]] = without(copied[path[0]], path[1:])
    return copied


def json_texts(value: Any) -> Iterator[tuple[str, str]]:
    """(name, text): the JSON value with every value in it replaced or left out, and texts that are no JSON."""
    for path in places(value):
        where = ".".join(map(str, path)) or "all"
        for name, new in VALUES.items():
            yield f"{where}={name}", json.dumps(put(value, path, new))
        for name, raw in RAW.items():
            yield f"{where}={name}", json.dumps(put(value, path, MARK)).replace(f'"{MARK}"', raw)
        if path:
            yield f"without {where}", json.dumps(without(value, path))
    whole = json.dumps(value)
    yield "unknown key", json.dumps({**value, "unknown": 1}) if isinstance(value, dict) else whole + "1"
    yield "empty", ""
    yield "half", whole[: len(whole) // 2]
    yield "twice", whole + whole
    yield "byte order mark", "\ufeff" + whole


def byte_changes(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, bytes): the data cut, prolonged, zeroed or changed at places spread over it."""
    size = len(data)
    yield "empty", b""
    for tenth in (1, 3, 5, 7, 9):
        at = size * tenth // 10
        yield f"cut at {tenth}0 %", data[:at]
        yield f"zeros from {tenth}0 %", data[:at] + bytes(min(64, size - at)) + data[at + 64 :]
        yield f"a byte at {tenth}0 %", data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
    for at in (0, 4, 8, 9, 16, 40):
        if at < size:
            yield f"byte {at}", data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
    yield "last byte", data[:-1] + bytes([data[-1] ^ 0xFF])
    yield "prolonged", data + b"\x00" * 100
    yield "text", b"not this\n"
    yield "pickle", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94."
