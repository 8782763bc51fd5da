"""A second judge for the IMDb run, independent of the reward model that trains: word counts, no neural network.

`train` makes log-odds of words and word pairs from labelled reviews; `score` is a Python-function reward:

    ple-score --data runs/imdb/ple/data --reward-model recipes/imdb/judge.py:score --output runs/imdb/second
"""

import json
import math
import os
import re
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

WEIGHTS = Path(os.environ.get("IMDB_JUDGE", "runs/imdb/judge.json"))
LEAST_COUNT = 5


def features(text: str) -> set[str]:
    """Words and neighbouring pairs, lower case, each once."""
    words = re.findall(r"[a-z']+", text.lower())
    return {*words, *(f"{a} {b}" for a, b in pairwise(words))}


def train(texts: list[str], labels: list[int]) -> dict[str, float]:
    """Naive Bayes: smoothed log-odds of each feature that occurs LEAST_COUNT times."""
    counts = {0: Counter[str](), 1: Counter[str]()}
    for text, label in zip(texts, labels, strict=True):
        counts[label].update(features(text))
    reviews = Counter(labels)
    return {
        feature: math.log((counts[1][feature] + 1) / (reviews[1] + 2))
        - math.log((counts[0][feature] + 1) / (reviews[0] + 2))
        for feature in counts[0].keys() | counts[1].keys()
        if counts[0][feature] + counts[1][feature] >= LEAST_COUNT
    }


@cache
def _weights() -> dict[str, float]:
    return json.loads(WEIGHTS.read_text())


def score(xs: list[str], ys: list[str]) -> list[float]:
    """Mean log-odds of the known features of x + y, times 10; 0 for a text without any."""
    scores = []
    for x, y in zip(xs, ys, strict=True):
        known = [_weights()[f] for f in features(x + y) if f in _weights()]
        scores.append(10 * sum(known) / len(known) if known else 0.0)
    return scores
