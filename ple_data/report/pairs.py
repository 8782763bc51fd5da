"""The pairs that the page shows: a bounded sample, with the words in which y and y_prompt differ.

Every text is made visible (control and bidi characters as ⟨U+202E⟩); escaping is the template's work.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from ple_data.partition import own_tau, partition
from ple_data.storage.store import collect
from schemas.tables import ARMS, KEY

SHOWN_PAIRS = 300
LONGEST_TEXT = 4000
"""Characters of a text that are shown."""

SHOWN = ["x", "y", "y_prompt", "y_finish", "y_prompt_finish", "s", "s_prompt", "margin", "set", "tau"]
LENGTHS = [pl.col(f"{arm}_ids").list.len().alias(f"length_{arm}") for arm in ARMS]

Segments = list[tuple[bool, str]]
"""Pieces of a text in order: (it differs from the other response, text)."""

MOST_STEPS = 1_000_000
"""Bound on the steps of a word by word comparison; with more (long or repetitive texts) it compares the ends alone."""

_WORDS = re.compile(r"\S+\s*|\s+")
_UNUSUAL = re.compile(r"[^ -~\n\t]")
_HIDDEN_CATEGORIES = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}
_BLANKS = "\u115f\u1160\u2065\u3164\uffa0"  # letters without a shape, and an unassigned character that is ignored
_IGNORED_PLANE = range(0xE0000, 0xE1000)  # tags and variation selectors: text that no one sees
_JOINERS = "\u200c\u200d"  # they shape letters and emoji


def sample_pairs(pairs: pl.LazyFrame, tau0: float, alpha: float, limit: int = SHOWN_PAIRS) -> list[dict[str, Any]]:
    """At most `limit` pairs, as many of each round, evenly spaced over its margins (the extremes among them).

    In the order of round and falling margin. Reads the keys and margins of all rows and the texts of the sample.
    """
    threshold = own_tau(pairs, tau0, alpha)
    frame = pairs.with_columns(*partition(threshold)[:2], threshold.alias("tau"))
    keys = collect(frame.select(*KEY, "margin")).sort("round", "margin", "query_id", "sample")
    parts = keys.partition_by("round", maintain_order=True)
    chosen = [keys.clear()]
    for place, part in enumerate(parts):
        count = min(limit // len(parts) + (place < limit % len(parts)), part.height)
        chosen.append(part[np.unique(np.linspace(0, part.height - 1, count).round().astype(int))])
    rows = collect(frame.join(pl.concat(chosen).lazy(), on=KEY, how="semi").select(*KEY, *SHOWN, *LENGTHS))
    order = rows.sort("round", "margin", "query_id", "sample", descending=[False, True, False, False])
    return [card(row) for row in order.iter_rows(named=True)]


def card(row: dict[str, Any]) -> dict[str, Any]:
    """A row of SHOWN and LENGTHS as the template shows it."""
    y, y_prompt = word_difference(clipped(row["y"]), clipped(row["y_prompt"]))
    return row | {"query_id": visible(row["query_id"]), "x": clipped(row["x"]), "y": y, "y_prompt": y_prompt}


def clipped(text: str) -> str:
    """The visible text, or its beginning and how much is left."""
    rest = len(text) - LONGEST_TEXT
    return visible(text) if rest <= 0 else f"{visible(text[:LONGEST_TEXT])} … ({rest} more characters)"


def visible(text: str) -> str:
    """The text with every character that is invisible or turns the text's direction written out."""
    return _UNUSUAL.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩" if _is_hidden(found[0]) else found[0], text)


def _is_hidden(character: str) -> bool:
    if character in _JOINERS:
        return False
    unseen = character in _BLANKS or ord(character) in _IGNORED_PLANE
    return unseen or unicodedata.category(character) in _HIDDEN_CATEGORIES


def word_difference(a: str, b: str) -> tuple[Segments, Segments]:
    """Both texts in pieces that they share and pieces in which they differ, word by word, spaces with the word before.

    The pieces of each, joined, are the text. Beyond `MOST_STEPS` all between the common beginning and end differs.
    """
    words_a, words_b = _WORDS.findall(a), _WORDS.findall(b)
    left: Segments = []
    right: Segments = []
    for kind, a1, a2, b1, b2 in _blocks([word.strip() for word in words_a], [word.strip() for word in words_b]):
        for segments, words in ((left, words_a[a1:a2]), (right, words_b[b1:b2])):
            text = "".join(words)
            bare = text if kind == "equal" else text.rstrip()
            segments += [piece for piece in ((kind != "equal", bare), (False, text[len(bare) :])) if piece[1]]
    return left, right


def _blocks(a: list[str], b: list[str]) -> Sequence[tuple[str, int, int, int, int]]:
    """Equal and differing blocks as (kind, start and end in a, start and end in b)."""
    if _most_steps(a, b) <= MOST_STEPS:
        return difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    start = _common(a, b)
    end = _common(a[start:][::-1], b[start:][::-1])
    a_end, b_end = len(a) - end, len(b) - end
    return [
        ("equal", 0, start, 0, start),
        ("replace", start, a_end, start, b_end),
        ("equal", a_end, len(a), b_end, len(b)),
    ]


def _most_steps(a: list[str], b: list[str]) -> int:
    """A bound on what SequenceMatcher does: a block takes a pass over a and all equal words of b, which many blocks of
    repetitive texts make cubic.
    """
    often = Counter(b)
    return min(len(a), len(b)) * (len(a) + sum(often[word] for word in a))


def _common(a: list[str], b: list[str]) -> int:
    """How many words are the same from the beginning on."""
    differ = (place for place, (one, other) in enumerate(zip(a, b, strict=False)) if one != other)
    return next(differ, min(len(a), len(b)))
