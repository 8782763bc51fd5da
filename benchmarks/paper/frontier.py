"""The math of the frontier: rewards along a method's curve, at equal KL, with intervals over queries and seeds.

A curve is the start policy and the points of one method and seed, joined by straight lines over the root of KL, along
which rewards rise about evenly (Gao et al. 2023): over KL itself they bend, and a line between two points far apart
lies below the curve. Arrays are [points, draws]: column 0 is of all queries as they are, every other one of a bootstrap
draw of them, the same draws for all policies. Pure functions of numpy arrays; reads no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from schemas.reports import Estimate

DRAWS = 2000
CONFIDENCE = 0.95
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5 % quantile of Student's t for 1 to 9 degrees of freedom."""


@cache
def weights(queries: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """[1 + draws, queries], each row sums to 1: all queries alike, then bootstrap draws. Times values: their means."""
    drawn = np.random.default_rng(seed).multinomial(queries, np.full(queries, 1 / queries), size=draws)
    return np.concatenate([np.ones((1, queries)), drawn]) / queries


def distance(kl: np.ndarray) -> np.ndarray:
    """The root of KL in nats, 0 where an estimate of it is below 0."""
    return np.sqrt(kl.clip(0))


def along(x: np.ndarray, y: np.ndarray, level: np.ndarray | float) -> np.ndarray:
    """y of the curve at x = level. x, y: [points, draws]; level: one, or one a draw → [draws].

    Beyond the curve's end it is that of its end: ask `reaches` first.
    """
    first, left, width, rise = _steps(x, y)
    return first + (_passed(left, width, level) * rise).sum(axis=0)


def area(x: np.ndarray, y: np.ndarray, upto: float) -> np.ndarray:
    """Mean height of the curve from x = 0, its first point, to `upto`: its area divided by `upto` → [draws]."""
    first, left, width, rise = _steps(x, y)
    under = _passed(left, width, upto) ** 2 * width / 2 + np.maximum(upto - left - width, 0)
    return first + (under * rise).sum(axis=0) / upto


def reaches(x: np.ndarray, level: float) -> bool:
    """Whether the curve, on all queries, goes so far."""
    return bool(x[:, 0].max() >= level)


def _steps(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The height at the first point, and of each step from point to point its left end, width and rise, by rising x."""
    order = np.argsort(x, axis=0, kind="stable")
    x, y = np.take_along_axis(x, order, 0), np.take_along_axis(y, order, 0)
    return y[0], x[:-1], np.diff(x, axis=0), np.diff(y, axis=0)


def _passed(left: np.ndarray, width: np.ndarray, level: np.ndarray | float) -> np.ndarray:
    """The share of each step, 0 to 1, that lies below `level`."""
    share = np.divide(level - left, width, out=np.where(level >= left, 1.0, 0.0), where=width > 0)
    return np.clip(share, 0, 1)


def estimate(seeds: Sequence[np.ndarray]) -> Estimate:
    """The mean over seeds of a number, [draws] of each seed, with a 95 % interval over queries and seeds.

    Half its width is the root of the sum of two squares: half the bootstrap interval over queries of the mean over
    these seeds, and Student's t times the seeds' standard error (left out where there is one seed).
    """
    own = np.array([draws[0] for draws in seeds])
    low, high = np.quantile(np.mean(seeds, axis=0)[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    between = STUDENT[len(own) - 2] * own.std(ddof=1) / np.sqrt(len(own)) if len(own) > 1 else 0.0
    half = float(np.hypot((high - low) / 2, between))
    mean = float(own.mean())
    return Estimate(mean=mean, low=mean - half, high=mean + half, count=len(own))
