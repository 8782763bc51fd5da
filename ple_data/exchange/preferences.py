"""A row of another tool's preferences as pairs (x, y, y_prompt, s, s_prompt). Knows no tokens and no store.

y_prompt is the chosen response and y the rejected one: what PLE calls guided is what the reader says is better.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import polars as pl

from ple_data.inputs.chat import HH_TURN, Message, X, beyond_text, hh_messages, hh_turns, is_turns, to_text
from ple_data.inputs.readers import Source, open_rows
from schemas.errors import UsageError

Pair = tuple[X, str, str, float | None, float | None]
"""x, y, y_prompt, s, s_prompt; both rewards or none."""
COLUMNS = {"x": pl.String, "y": pl.String, "y_prompt": pl.String, "s": pl.Float64, "s_prompt": pl.Float64}
SCORES = (("score_rejected", "score_chosen"), ("rejected_rating", "chosen_rating"))
"""Names of the scores of y and y_prompt beside chosen and rejected: TRL's and UltraFeedback's, distilabel's."""
LISTS = (("prompt", "responses", "rewards"), ("instruction", "generations", "ratings"))
"""Names where all responses to a query stand in one row: Online-RLHF's, distilabel's."""
LARGEST = 3.4028234663852886e38
"""Of float32."""
NAMED_ROWS = 10
"""How many faulty rows an error names."""


class GoesOnError(ValueError):
    """Two HH dialogues with more turns behind the answer in which they differ: these are part of no response."""


def read_pairs(
    files: Iterable[str], *, chat: bool, refused: Callable[[X], str | None]
) -> tuple[pl.DataFrame, list[Source], int]:
    """The pairs of all files in their order (`COLUMNS`, x as `to_text` writes it), the files, and how many rows are
    left out because they go on after the answer.

    chat: HH dialogues become messages. refused: why a query is not for the model, where it is not. Raises UsageError
    that names the faulty rows: nothing is taken then. Either all rows have scores or none has.
    """
    sources = [open_rows(file) for file in files]
    tables, faults, unscored, left_out = [], [], [], 0
    for source in sources:
        for rows in source.parts():
            found: list[Pair] = []
            for row, place in zip(rows.rows, rows.places, strict=True):
                try:
                    pairs = to_pairs(row, chat=chat)
                    if why := refused(pairs[0][0]):
                        raise ValueError(why)
                except GoesOnError:
                    left_out += 1
                    continue
                except ValueError as fault:
                    faults.append(f"{source.name} {place}: {fault}")
                    continue
                found += pairs
                if pairs[0][3] is None:
                    unscored.append(f"{source.name} {place}: it has no scores, and other rows have")
            values = [(to_text(x), *others) for x, *others in found]
            tables.append(pl.DataFrame(values, schema=COLUMNS, orient="row"))
    table = pl.concat(tables, rechunk=True)
    if len(unscored) and table["s"].count():
        faults += unscored
    if faults:
        more = f"; and {len(faults) - NAMED_ROWS} more rows" if len(faults) > NAMED_ROWS else ""
        raise UsageError(f"{'; '.join(faults[:NAMED_ROWS])}{more}: correct or remove them; nothing was imported")
    if not len(table):
        raise UsageError(
            f"{', '.join(source.name for source in sources)}: all {left_out} dialogues go on after the answer in which "
            "chosen and rejected differ: end them with it; nothing was imported"
        )
    return table, sources, left_out


def to_pairs(row: dict[str, Any], *, chat: bool = False) -> list[Pair]:
    """The pairs of a row: one of chosen and rejected, of several scored responses the best and the worst, of several
    without scores each two neighbours. Raises ValueError that says what is wrong with it. `GoesOnError` of
    two HH dialogues that are no pair.
    """
    for messages in map(row.get, ("prompt", "messages", "chosen", "rejected")):
        if found := beyond_text(messages, row):
            raise ValueError(f"it has {found}, and pairs are text alone, without tools or images")
    if row.get("chosen") is not None or row.get("rejected") is not None:
        x, y_prompt, y = _preference(row, chat)
        names = next((pair for pair in SCORES if any(row.get(name) is not None for name in pair)), SCORES[0])
        s, s_prompt = (row.get(name) for name in names)
        if s is not None or s_prompt is not None:
            s, s_prompt = _score(names[0], s), _score(names[1], s_prompt)
        return [(_query(x), y, y_prompt, s, s_prompt)]
    for prompt, responses, rewards in LISTS:
        if row.get(responses) is not None:
            x = _query(row.get("messages") or row.get(prompt))
            return _of_several(x, responses, row[responses], rewards, row.get(rewards))
    raise ValueError(f"it has neither chosen and rejected nor prompt and responses, but {', '.join(row) or 'nothing'}")


def _preference(row: dict[str, Any], chat: bool) -> tuple[Any, str, str]:
    """x, chosen, rejected."""
    chosen, rejected, prompt = row.get("chosen"), row.get("rejected"), row.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return (prompt, chosen, rejected) if prompt is not None else _of_dialogue(chosen, rejected, chat)
    if not (is_turns(chosen) and is_turns(rejected) and chosen and rejected):
        raise ValueError("chosen and rejected must be two texts, or two lists of messages with role and content")
    (*turns, good), (*others, bad) = _plain(chosen), _plain(rejected)
    if turns != others:
        raise ValueError("chosen and rejected do not answer the same turns")
    if {good["role"], bad["role"]} != {"assistant"}:
        raise ValueError("chosen and rejected must end with an assistant turn")
    if turns and is_turns(prompt) and _plain(prompt) != turns:
        raise ValueError("chosen begins with other turns than prompt has")
    return turns or prompt, good["content"], bad["content"]


def _of_dialogue(chosen: str, rejected: str, chat: bool) -> tuple[X, str, str]:
    """Two HH dialogues that differ in the last answer."""
    (chosen, turns), (rejected, _) = hh_turns(chosen), hh_turns(rejected)
    last = next((turn for turn in reversed(turns) if turn[1] == "Assistant"), None)
    if last is None or turns[0][1] != "Human":
        raise ValueError("without a prompt, chosen must be messages or a dialogue of 'Human:' and 'Assistant:' turns")
    x = chosen[: last.end()]
    if not rejected.startswith(x):
        raise ValueError("chosen and rejected do not answer the same dialogue")
    if any(HH_TURN.search(text, len(x)) for text in (chosen, rejected)):
        raise GoesOnError("chosen or rejected goes on after the answer in which they differ")
    good, bad = chosen[len(x) :], rejected[len(x) :]
    return (hh_messages(x), good.strip(), bad.strip()) if chat else (x, good, bad)


def _of_several(x: X, name: str, responses: Any, rewards_name: str, rewards: Any) -> list[Pair]:
    if not isinstance(responses, list) or len(responses) < 2 or not all(isinstance(y, str) for y in responses):
        raise ValueError(f"{name} must be a list of two texts or more")
    if rewards is None:
        if len(responses) % 2:
            raise ValueError(f"{name} without rewards become pairs, two and two: give an even number of them")
        return [(x, y, other, None, None) for y, other in zip(responses[::2], responses[1::2], strict=True)]
    if not isinstance(rewards, list) or len(rewards) != len(responses):
        raise ValueError(f"{rewards_name} must be a list with one number for each of {name}")
    scores = [_score(rewards_name, reward) for reward in rewards]
    best = max(range(len(scores)), key=scores.__getitem__)
    worst = min((at for at in range(len(scores)) if at != best), key=scores.__getitem__)
    return [(x, responses[worst], responses[best], scores[worst], scores[best])]


def _query(x: Any) -> X:
    if isinstance(x, str) and x.strip():
        return x
    if is_turns(x) and x and x[-1]["role"] == "user" and x[-1]["content"].strip():
        return _plain(x)
    raise ValueError("the prompt must be a text, or messages that end with a user turn, and not empty")


def _plain(turns: Sequence[dict[str, Any]]) -> list[Message]:
    """The turns without other fields."""
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _score(name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or abs(value) > LARGEST or not math.isfinite(value):  # in this order: integers have no bound
        shown = "missing" if value is None else repr(value)[:80]
        raise ValueError(f"{name} is {shown}; it must be a finite number, as the other score is")
    return float(value)
