"""What a reward model at an address is asked and how it answers, by `--reward-format`. Asks nobody.

- ple: our own (docs/rewards.md);
- openrlhf: what OpenRLHF's trainer asks a remote reward model (its openrlhf/utils/agent.py, openrlhf/cli/serve_rm.py);
- vllm-classify, vllm-pooling: https://docs.vllm.ai/en/stable/models/pooling_models/. The server's own tokenizer and
  chat template make the ids; `use_activation` off gives the raw output, as our own classifier does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ple_data.inputs.chat import as_text
from ple_data.rewards.texts import run_on, turns
from schemas.options import Join, RewardFormat

Rows = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Form:
    """One form. path: where an address without a path is asked; joins: how it can join x and y, the last for `auto`,
    none where the server does.

    body: the request for some rows, one row where they are joined as a chat. field, answer: of the answer, for
    messages. read: the value of each row, a number or a list of them; what it may raise is a sign of another form.
    """

    path: str
    joins: tuple[Join, ...]
    body: Callable[[Rows, Join], dict[str, Any]]
    field: str
    answer: str
    read: Callable[[Any], Any]


def _ours(rows: Rows, join: Join) -> dict[str, Any]:
    return {"inputs": [{"x": x, "y": y} for x, y in rows]}


def _openrlhf(rows: Rows, join: Join) -> dict[str, Any]:
    """query: x and y as one text; prompts: x; labels: what a row was to be answered with, which is not known here."""
    texts = {"query": [run_on(x, y) for x, y in rows], "prompts": [as_text(x) for x, _ in rows]}
    return {**texts, "labels": [""] * len(rows)}


def _vllm(rows: Rows, join: Join) -> dict[str, Any]:
    if join == "chat":
        [(x, y)] = rows
        return {"messages": turns(x, y), "use_activation": False}
    return {"input": [run_on(x, y) for x, y in rows], "use_activation": False}


def _pooling(rows: Rows, join: Join) -> dict[str, Any]:
    return {**_vllm(rows, join), "encoding_format": "float"}


def _in_order(found: Any, field: str) -> list[Any]:
    return [item[field] for item in sorted(found["data"], key=lambda item: int(item["index"]))]


TEXT: tuple[Join, ...] = ("auto", "text")
TEMPLATE: tuple[Join, ...] = ("auto", "text", "chat")
FORMS: dict[RewardFormat, Form] = {
    "ple": Form("", (), _ours, "scores", '{"scores": [...]}', lambda found: found["scores"]),
    "openrlhf": Form("/get_reward", TEXT, _openrlhf, "rewards", '{"rewards": [...]}', lambda found: found["rewards"]),
    "vllm-classify": Form(
        "/classify", TEMPLATE, _vllm, "probs", '{"data": [{"probs": [...]}]}', lambda found: _in_order(found, "probs")
    ),
    "vllm-pooling": Form(
        "/pooling", TEMPLATE, _pooling, "data", '{"data": [{"data": [...]}]}', lambda found: _in_order(found, "data")
    ),
}


def number_of(value: Any, output: int | None) -> float | str | None:
    """The reward in one row's value: a number, the output of a list of them, or that of the last token's list.

    None where it is nothing of that kind, and what is wrong where the output is not clear or not there.
    """
    if isinstance(value, list) and value and isinstance(value[-1], list):
        value = value[-1]
    if isinstance(value, list):
        if output is None and len(value) > 1:
            return f"it gives {len(value)} outputs: choose the one that is the reward with --output-index"
        if output is not None and output >= len(value):
            return f"it has no output {output}: --output-index is at most {len(value) - 1}"
        value = value[output or 0] if value else None
    whole = type(value) is int and abs(value) < 1e308
    return float(value) if whole or type(value) is float else None
