"""Thoughts: what a model writes between two marks before its answer. The answer is what a reward model sees.

A template may write the opening mark into the prompt: then the response begins inside the thought, and so it does where
a closing mark comes first. A mark may be a special token, which no text holds, so it is looked for in the ids, and then
in the text. Token ids are never changed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ple_data.common.tokens import added_ids, text_after
from schemas.errors import UsageError

CLOSING = re.compile(r"([<\[])/((?:[\w:]*)(?:think|thought|reason)\w*)([>\]])", re.IGNORECASE)
"""A closing mark as templates and vocabularies write it."""
TAIL = 32
"""Ids at the end of a prompt among which an opening mark is looked for."""


@dataclass(frozen=True)
class Told:
    """A response in two: its answer, and the thought before it. answered: whether the thought ended; None where
    thoughts are not looked for. One without a thought is all answer."""

    answer: str
    thought: str | None = None
    answered: bool | None = None


class Thoughts:
    """Takes responses apart. `marks`: the opening and the closing one."""

    def __init__(self, tokenizer: Any, asked: str) -> None:
        """asked: `--strip-thoughts`. Raises UsageError where that names no marks, or there are none or several."""
        self._tokenizer = tokenizer
        self.marks = _marks(tokenizer, asked)
        self._added = added_ids(tokenizer)
        self._ids = [self._ids_of(mark) for mark in self.marks]

    def of(self, prompt: Sequence[int], ids: Sequence[int], text: str) -> Told:
        """The response in two: its ids after those of the prompt, and what they say (cut before a stop string)."""
        begun = self._tokenizer.decode(list(prompt[-TAIL:]), skip_special_tokens=False).rstrip().endswith(self.marks[0])
        opened, closed = (self._place(which, prompt, ids, text) for which in (0, 1))
        if opened is None or text[: opened[0]].strip():
            closes = closed is not None and (opened is None or closed < opened)  # what was not opened in the response
            if not (begun or closes):
                return Told(text, None, True)
            opened = (0, 0)
        if closed is None:
            return Told("", text[opened[1] :].strip(), False)
        return Told(text[closed[1] :].lstrip(), text[opened[1] : closed[0]].strip(), True)

    def _place(self, which: int, prompt: Sequence[int], ids: Sequence[int], text: str) -> tuple[int, int] | None:
        """Where a mark first stands in the text: from, to. They are the same where it is a token that no text holds."""
        mark, wanted = self.marks[which], self._ids[which]
        for at in range(len(ids) - len(wanted) + 1 if wanted else 0):
            if list(ids[at : at + len(wanted)]) == wanted:
                first, last = (len(text_after(self._tokenizer, prompt, ids[:end])) for end in (at, at + len(wanted)))
                return first, last
        at = text.find(mark)  # a token of its own may also be sampled in pieces
        return None if at < 0 else (at, at + len(mark))

    def _ids_of(self, mark: str) -> list[int]:
        """Ids of a mark that is, or holds, a token of its own; none where it is text."""
        if (own := self._tokenizer.get_added_vocab().get(mark)) is not None:
            return [own]
        ids = list(self._tokenizer(mark, add_special_tokens=False)["input_ids"])
        return ids if self._added & set(ids) else []


def _marks(tokenizer: Any, asked: str) -> tuple[str, str]:
    words = asked.split()
    if len(words) == 2:
        return words[0], words[1]
    if asked != "auto":
        if not re.fullmatch(r"[\w:.-]+", asked):
            raise UsageError(
                f"--strip-thoughts {asked!r}: give auto, a name such as think, or both marks with a space between"
            )
        return f"<{asked}>", f"</{asked}>"
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    texts = [template, *tokenizer.get_added_vocab()]
    found = {("".join(mark.groups()), mark.group()): None for text in texts for mark in CLOSING.finditer(text)}
    if len(found) != 1:
        there = (
            f"several marks of thoughts ({', '.join(close for _, close in found)})" if found else "no mark of thoughts"
        )
        raise UsageError(
            f"--strip-thoughts auto: the chat template and tokens of {tokenizer.name_or_path} have {there}; name them, "
            "e.g. --strip-thoughts think"
        )
    return next(iter(found))
