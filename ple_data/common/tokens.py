"""What token ids say after other ids, and which ids a text has there: one rule in both directions. No model.

SentencePiece tokenizers drop the space in front of a text when they decode it, and put one there when they encode it.
"""

from collections.abc import Sequence
from typing import Any

CONTEXT = 4
"""Ids of the prompt that are decoded with a response, and more where these say nothing or begin inside a character."""


def text_after(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """What before + ids decode to, less what before does; without special tokens, spaces as they are."""
    width, known = CONTEXT, _decode(tokenizer, before[-CONTEXT:])
    while width < len(before) and (not known or known.startswith("\ufffd")):
        width *= 4
        known = _decode(tokenizer, before[-width:])
    whole = _decode(tokenizer, [*before[-width:], *ids])
    return whole[len(known) :] if whole.startswith(known) else _decode(tokenizer, ids)  # as bytes that are no character


def ids_after(tokenizer: Any, befores: Sequence[Sequence[int]], texts: Sequence[str], lead: str) -> list[list[int]]:
    """Token ids of each text where it stands after its ids `before`, so that `text_after` gives the text.

    lead: white space that stands before a text which begins without any.
    """
    if not texts:
        return []
    given = [text if not text or text[0].isspace() else lead + text for text in texts]
    probe = tokenizer("a", add_special_tokens=False)["input_ids"]
    if text_after(tokenizer, probe, probe) == "a":  # nothing is put in front
        return tokenizer(given, add_special_tokens=False)["input_ids"]
    alone = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [_ids_after(tokenizer, *row) for row in zip(befores, given, alone, strict=True)]


def _ids_after(tokenizer: Any, before: Sequence[int], text: str, alone: list[int]) -> list[int]:
    added = before and before[-1] in added_ids(tokenizer)
    anchor = tokenizer.convert_ids_to_tokens(before[-1]) if added else "\n"
    head, ids = tokenizer([anchor, anchor + text], add_special_tokens=False)["input_ids"]
    found = before and ids[: len(head)] == head and tokenizer.unk_token_id not in head
    return ids[len(head) :] if found else alone


def added_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that are no pieces of text: BOS, ends of turns, and others that were added."""
    return set(tokenizer.get_added_vocab().values())


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
