"""The pairs that the page shows: a bounded sample, with the words in which y and y_prompt differ.

Every text is made visible (control and bidi characters as ⟨U+202E⟩); escaping is the template's work.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from typing import Any

import numpy as np
import polars as pl

from ple_data.partition import own_tau, partition
from ple_data.store import collect
from schemas.tables import KEY

SHOWN_PAIRS = 300
LONGEST_TEXT = 4000
"""Characters of a text that are shown."""

Segments = list[tuple[bool, str]]
"""Pieces of a text in order: (it differs from the other response, text)."""

_WORDS = re.compile(r"\S+\s*|\s+")
_INVISIBLE = re.compile(r"[^\S \n\t]|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
_JOINERS = "\u200c\u200d"  # they shape letters and emoji


def sample_pairs(pairs: pl.LazyFrame, tau0: float, alpha: float, limit: int = SHOWN_PAIRS) -> list[dict[str, Any]]:
    """At most `limit` pairs, as many of each round, evenly spaced over its margins (the extremes among them).

    In the order of round and falling margin. Reads the keys and margins of all rows and the texts of the sample.
    """
    threshold = own_tau(pairs, tau0, alpha)
    frame = pairs.with_columns(*partition(threshold)[:2], threshold.alias("tau"))
    keys = collect(frame.select(*KEY, "margin")).sort("round", "margin", "query_id", "sample")
    parts = keys.partition_by("round", maintain_order=True)
    each = [limit // len(parts) + (place < limit % len(parts)) for place in range(len(parts))] if parts else []
    chosen = [
        part[np.unique(np.linspace(0, part.height - 1, min(count, part.height)).round().astype(int))].select(KEY)
        for part, count in zip(parts, each, strict=True)
        if count
    ]
    if not chosen:
        return []
    lengths = [pl.col(f"{arm}_ids").list.len().alias(f"length_{arm}") for arm in ("y", "y_prompt")]
    texts = ["x", "y", "y_prompt", "y_finish", "y_prompt_finish", "s", "s_prompt", "margin", "set", "tau"]
    rows = collect(frame.join(pl.concat(chosen).lazy(), on=KEY, how="semi").select(*KEY, *texts, *lengths))
    order = rows.sort("round", "margin", "query_id", "sample", descending=[False, True, False, False])
    return [_card(row) for row in order.iter_rows(named=True)]


def _card(row: dict[str, Any]) -> dict[str, Any]:
    y, y_prompt = clipped(row["y"]), clipped(row["y_prompt"])
    y_segments, y_prompt_segments = word_difference(y, y_prompt)
    shown = {"query_id": visible(row["query_id"]), "x": clipped(row["x"])}
    return row | shown | {"y": y_segments, "y_prompt": y_prompt_segments}


def clipped(text: str) -> str:
    """The visible text, or its beginning and how much is left."""
    rest = len(text) - LONGEST_TEXT
    return visible(text) if rest <= 0 else f"{visible(text[:LONGEST_TEXT])} … ({rest} more characters)"


def visible(text: str) -> str:
    """The text with every character that is invisible or turns the text's direction written out."""
    return _INVISIBLE.sub(lambda found: found[0] if _is_kept(found[0]) else f"⟨U+{ord(found[0]):04X}⟩", text)


def _is_kept(character: str) -> bool:
    return character in _JOINERS or unicodedata.category(character) == "Zs"


def word_difference(a: str, b: str) -> tuple[Segments, Segments]:
    """Both texts in pieces that they share and pieces in which they differ, word by word, spaces with the word before.

    The pieces of each, joined, are the text.
    """
    words_a, words_b = _WORDS.findall(a), _WORDS.findall(b)
    matcher = difflib.SequenceMatcher(
        None, [word.strip() for word in words_a], [word.strip() for word in words_b], autojunk=False
    )
    left: Segments = []
    right: Segments = []
    for kind, a1, a2, b1, b2 in matcher.get_opcodes():
        for segments, words in ((left, words_a[a1:a2]), (right, words_b[b1:b2])):
            text = "".join(words)
            bare = text if kind == "equal" else text.rstrip()
            segments += [piece for piece in ((kind != "equal", bare), (False, text[len(bare) :])) if piece[1]]
    return left, right
