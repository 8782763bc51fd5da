"""A toy world of film reviews, written by a small grammar (`grammar.json`): the data of `ple demo`.

A review is a neutral opening (the query) and a few sentences, each of which praises, blames or tells. The grammar knows
what every one of its sentences says, so it is also a judge of its own: see `grade`. Nothing here trains or samples a
model.
"""

import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.files import write_atomic

_WORDS = json.loads(Path(__file__).with_name("grammar.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Review:
    """One review: its opening, its body (with a leading space) and the mean polarity of its sentences."""

    opening: str
    body: str
    polarity: float

    @property
    def text(self) -> str:
        return self.opening + self.body


def openings() -> list[str]:
    """Every opening there is, always in the same order."""
    parts = itertools.product(*(_WORDS[part] for part in ("openings", "films", "topics", "times")))
    return [f"{opening} {film} about {topic} {time}." for opening, film, topic, time in parts]


def sentences(polarity: int) -> list[str]:
    """Every sentence of the grammar that praises (+1), blames (-1) or tells (0)."""
    parts = _WORDS["parts"]
    if polarity == 0:
        return [
            *(f"It is set in {place}." for place in _WORDS["places"]),
            *(f"It runs for {number}." for number in _WORDS["numbers"]),
            *(f"The {part} is mostly in the {half}." for part in parts[:5] for half in parts[6:8]),
        ]
    words = _WORDS["praise" if polarity > 0 else "blame"]
    return [
        *(f"The {part} was {adjective}." for part in parts for adjective in words["adjective"]),
        *(f"I {felt} the {part}." for felt in words["felt"] for part in parts),
        *words["advice"],
    ]


def reviews(seed: int, among: list[str]) -> Iterator[Review]:
    """Endless reviews whose openings are drawn from `among`; as many lean to praise as to blame."""
    draw = random.Random(seed)
    kinds = {polarity: sentences(polarity) for polarity in (-1, 0, 1)}
    while True:
        praise = draw.choice([0.15, 0.35, 0.5, 0.65, 0.85])
        told = []
        for _ in range(draw.randint(1, 5)):
            polarity = 0 if draw.random() < 0.25 else 1 if draw.random() < praise else -1
            told.append((polarity, draw.choice(kinds[polarity])))
        body = "".join(f" {sentence}" for _, sentence in told)
        yield Review(draw.choice(among), body, sum(polarity for polarity, _ in told) / len(told))


@dataclass(frozen=True)
class Verdict:
    """What the grammar says of a text: mean polarity (-1 to 1), and the share of sentences it could have written."""

    polarity: float
    grammatical: float


def grade(body: str) -> Verdict:
    """Judges a response by the grammar alone; a sentence it does not know counts as 0. An empty text is (0, 0)."""
    found = [sentence for sentence in re.split(r"(?<=\.)\s+", body.strip()) if sentence]
    if not found:
        return Verdict(0.0, 0.0)
    polarities = [_POLARITY.get(sentence) for sentence in found]
    known = [polarity for polarity in polarities if polarity is not None]
    return Verdict(sum(known) / len(found), len(known) / len(found))


def polarity(xs: list[str], ys: list[str]) -> list[float]:
    """The grammar as a reward model: mean polarity of each response."""
    return [grade(y).polarity for y in ys]


def grammatical(xs: list[str], ys: list[str]) -> list[float]:
    """The same of the share of sentences that it could have written."""
    return [grade(y).grammatical for y in ys]


_POLARITY = {sentence: polarity for polarity in (-1, 0, 1) for sentence in sentences(polarity)}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows as JSONL, in place at once."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
