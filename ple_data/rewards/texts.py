"""How a query x and a response y become the token ids that a classifier reads. No torch, no model.

`ple reward` trains on what this module makes, so that a reward model reads in use what it read in training.
"""

from dataclasses import dataclass
from typing import Any

from ple_data.inputs.chat import Message, alternating, as_chat, as_text
from ple_data.inputs.templates import rendered
from schemas.errors import PleError, UsageError
from schemas.options import Join


@dataclass(frozen=True)
class Encoded:
    """Token ids of one (x, y); cut says whether its beginning was left out to fit the model."""

    ids: list[int]
    token_type_ids: list[int] | None
    cut: bool


def resolve_join(join: Join, tokenizer: Any) -> Join:
    """ "auto" is chat where the tokenizer has a chat template, else text. Raises UsageError."""
    if join == "auto":
        return "chat" if tokenizer.chat_template else "text"
    if join == "chat" and not tokenizer.chat_template:
        raise UsageError("the reward model's tokenizer has no chat template: use --join text or pair")
    return join


def encode(tokenizer: Any, x: str, y: str, *, join: Join = "auto", max_length: int | None = None) -> Encoded:
    """The ids of (x, y), cut from the left of x where they are longer than max_length.

    - text: x and y run on as one text, with the tokenizer's own special tokens; a chat is written as a dialogue, and
      between "Assistant:" and y stands one space, or the white space that y begins with;
    - pair: x and y as the two segments of an encoder such as BERT;
    - chat: the tokenizer's chat template over the turns of x and one assistant turn y, whose outer white
      space is removed. x is a chat (JSON text), a dialogue of "Human:" and "Assistant:" turns, or one turn. Where the
      template refuses two turns of one speaker in a row, they are one.

    A leading BOS or CLS token stays when the text is cut.
    """
    kind = resolve_join(join, tokenizer)
    types = None
    if kind == "chat":
        ids = tokenizer(_render(tokenizer, x, y), add_special_tokens=False, verbose=False)["input_ids"]
    elif kind == "pair":
        both = tokenizer(as_text(x), y, verbose=False)
        ids, types = both["input_ids"], both.get("token_type_ids")
    else:
        ids = tokenizer(run_on(x, y), verbose=False)["input_ids"]
    if max_length is None or len(ids) <= max_length:
        return Encoded(ids, types, cut=False)
    head = 1 if ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else 0
    first = len(ids) - (max_length - head)
    return Encoded(ids[:head] + ids[first:], types and types[:head] + types[first:], cut=True)


def run_on(x: str, y: str) -> str:
    """x and y as one text; a stored chat is written as a dialogue."""
    x = as_text(x)
    if x.endswith(("Assistant:", "Assistant: ")) and y:
        x = x.removesuffix(" ") + ("" if y[0].isspace() else " ")
    return x + y


def turns(x: str, y: str) -> list[Message]:
    """The turns of x and one assistant turn y, without its outer white space."""
    return [*as_chat(x), {"role": "assistant", "content": y.strip()}]


def _render(tokenizer: Any, x: str, y: str) -> str:
    messages = turns(x, y)
    for asked in (messages, alternating(messages)):
        try:
            return rendered(tokenizer, asked, prompt=False)
        except Exception as error:  # a template may raise anything
            refused = error
    raise PleError(
        f"the reward model's chat template refuses a query ({refused}): x begins {x[:80]!r}; use --join text instead"
    ) from refused
