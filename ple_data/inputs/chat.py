"""Every form of a dialogue, once: chat messages, the JSON text of them in an `x` column, and HH's turns."""

import itertools
import json
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from schemas.json_text import parse_json

Message = dict[str, str]
"""A turn: its role (system, user, assistant) and content."""
X = str | list[Message]
"""A query x: a text, or chat messages."""
CHAT_START = '[{"role": '
"""How the text of chat messages begins in an `x` column."""
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
TITLES = {role: title for title, role in HH_ROLES.items()}
BESIDE = ("tools", "functions", "images", "image", "audio", "videos")
"""Columns and fields of a turn in which tools and pictures stand."""
SPEAKERS = {"user": "User", "assistant": "Assistant", "system": "System"}


def to_text(x: X) -> str:
    """x as the `x` column keeps it: a text as it is, chat messages as a JSON array."""
    return x if isinstance(x, str) else json.dumps(x, ensure_ascii=False)


def to_messages(text: str) -> list[Message]:
    """Chat messages of an `x` column: those that `to_text` wrote, or the text as one user turn."""
    return stored_chat(text) or [{"role": "user", "content": text}]


def stored_chat(x: str) -> list[Message] | None:
    """The messages that `to_text` wrote; None where x is a text."""
    if not x.startswith(CHAT_START):
        return None
    try:
        messages = parse_json(x)
    except ValueError:
        return None
    return messages if is_turns(messages) else None


def is_turns(value: Any) -> TypeGuard[list[Message]]:
    """Whether a value is a list of turns, each with role and content as text."""
    return isinstance(value, list) and all(
        isinstance(turn, dict) and all(isinstance(turn.get(field), str) for field in ("role", "content"))
        for turn in value
    )


def beyond_text(messages: Any, row: Mapping[str, Any]) -> str | None:
    """What chat messages, or the row that they stand in, hold beside text, in words; None where that is nothing."""
    if beside := next((name for name in BESIDE if row.get(name) not in (None, [], {}, "", "[]", "null")), None):
        return beside
    for turn in messages if isinstance(messages, list) else []:
        if not isinstance(turn, dict):
            continue
        if beside := next((name for name in (*BESIDE, "tool_calls", "function_call") if turn.get(name)), None):
            return beside
        if turn.get("role") in ("tool", "function"):
            return f"a turn of the role {turn['role']}"
        parts = turn.get("content")
        for part in parts if isinstance(parts, list) else []:
            if isinstance(part, dict) and part.get("type") != "text":
                return f"content of the type {str(part.get('type'))[:40]}"
    return None


def hh_turns(text: str) -> tuple[str, list[re.Match[str]]]:
    """An HH dialogue without a last Human turn that says nothing, and where its turns begin."""
    turns = list(HH_TURN.finditer(text))
    if len(turns) > 1 and turns[-1].group(1) == "Human" and not text[turns[-1].end() :].strip():
        text, turns = text[: turns[-1].start()], turns[:-1]
    return text, turns


def hh_messages(x: str) -> list[Message]:
    """The turns of an HH dialogue that ends with `Assistant:`."""
    turns = list(HH_TURN.finditer(x))
    return [
        {"role": HH_ROLES[turn.group(1)], "content": x[turn.end() : following.start()].strip()}
        for turn, following in itertools.pairwise(turns)
    ]


def as_chat(x: str) -> list[Message]:
    """The turns of x: a chat stored as JSON text, a Human/Assistant dialogue that says something, or one user turn."""
    if stored := stored_chat(x):
        return stored
    parts = HH_TURN.split(x)
    if len(parts) > 1 and not parts[0].strip() and parts[1] == "Human":
        turns = zip(parts[1::2], parts[2::2], strict=True)
        found = [{"role": HH_ROLES[who], "content": said.strip()} for who, said in turns if said.strip()]
        if found:
            return found
    return [{"role": "user", "content": x}]


def alternating(messages: list[Message]) -> list[Message]:
    """The same dialogue with neighbouring turns of one role as one, as some chat templates ask for."""
    groups = itertools.groupby(messages, key=lambda turn: turn["role"])
    return [{"role": role, "content": "\n\n".join(turn["content"] for turn in turns)} for role, turns in groups]


def as_text(x: str) -> str:
    """x itself; a stored chat as a Human/Assistant dialogue that ends where the answer begins."""
    stored = stored_chat(x)
    if stored is None:
        return x
    turns = [f"\n\n{TITLES[m['role']]}: {m['content']}" if m["role"] in TITLES else m["content"] for m in stored]
    return "".join(turns) + "\n\nAssistant: "


def readable(x: str) -> str:
    """x as a person or a judge reads it: a dialogue of several turns with who says what, anything else as it is."""
    messages = as_chat(x)
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{SPEAKERS.get(m['role'], m['role'])}: {m['content']}" for m in messages)
