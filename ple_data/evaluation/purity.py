"""Section 5 of the paper as numbers: how pure the level sets L(e) = {x : s_prompt - s >= e} are for a policy, the
smallest pure e, and the number of rounds by the proof of Theorem 5.3.

Takes arrays of margins s_prompt - s and of log-ratios log pi(y_prompt|x) - log pi(y|x), one number a pair (NaN: a
log-probability is missing). Gives the forms of `schemas.reports`; reads no file and runs no model. Purity compares the
two probabilities strictly: a tie is not pure. Counts are integers, so "95 %" of 20 pairs is 19 and nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from schemas.reports import PureSet, PurityBin, PurityBound, PurityCounts

Floats = NDArray[np.float64]

PERCENTS = (100, 95, 90)
SIDE_BINS = 5
"""Bins of equal count on each side of margin 0."""
TAILS = (0.05, 0.95)
"""Quantiles of the margin between which its density is bounded: every density falls to 0 in its tails."""
_DENSITY_BINS = 30


def smallest_pure(margin: Floats, log_ratio: Floats, percent: int) -> PureSet:
    """The smallest observed margin e > 0 (Lemma 5.2 takes e > 0) whose level set is pure at `percent` %.

    A level set holds every pair with a margin of at least e, ties included.
    """
    order = np.argsort(-margin, kind="stable")
    ordered = margin[order]
    pure = np.cumsum(log_ratio[order] > 0)
    size = np.arange(1, len(ordered) + 1)
    whole = np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)]  # the last pair of those with its margin
    found = np.flatnonzero(whole & (ordered > 0) & (100 * pure >= percent * size))
    if not len(found):
        return PureSet(percent=percent, e=None, pairs=0)
    return PureSet(percent=percent, e=float(ordered[found[-1]]), pairs=int(size[found[-1]]))


def count(margin: Floats, log_ratio: Floats, round: int | None = None) -> PurityCounts:
    """What one policy does on pairs: those of `round`, or all. Pairs without a log-probability are left out."""
    known = ~np.isnan(log_ratio)
    margin, log_ratio = margin[known], log_ratio[known]
    return PurityCounts(
        round=round,
        pairs=len(margin),
        ranked=int((margin != 0).sum()),
        agree=int(_agrees(margin, log_ratio).sum()),
        positive=int((margin > 0).sum()),
        pure_sets=[smallest_pure(margin, log_ratio, percent) for percent in PERCENTS],
    )


def _agrees(margin: Floats, log_ratio: Floats) -> NDArray[np.bool_]:
    return np.sign(margin) * np.sign(log_ratio) > 0


def bin_edges(margin: Floats) -> list[float]:
    """Edges of margin bins of about equal count, `SIDE_BINS` below 0 and as many above; 0 is an edge."""
    edges = {0.0}
    shares = np.linspace(0, 1, SIDE_BINS + 1)
    for side, outer in ((margin[margin < 0], shares[:-1]), (margin[margin > 0], shares[1:])):
        if len(side):
            edges |= set(np.quantile(side, outer).tolist())
    return sorted(edges)


def binned(margin: Floats, log_ratio: Floats, edges: Sequence[float]) -> list[PurityBin]:
    """Agreement by margin in the bins between `edges`; an inner edge belongs to the bin farther from 0."""
    kept = ~np.isnan(log_ratio) & (margin != 0)
    margin, log_ratio = margin[kept], log_ratio[kept]
    above = np.where(margin > 0, np.searchsorted(edges, margin, "right"), np.searchsorted(edges, margin, "left"))
    place = np.clip(above - 1, 0, len(edges) - 2)
    agree = place[_agrees(margin, log_ratio)]
    return [
        PurityBin(low=low, high=high, pairs=int((place == at).sum()), agree=int((agree == at).sum()))
        for at, (low, high) in enumerate(itertools.pairwise(edges))
    ]


def density_ratio(margin: Floats) -> float | None:
    """l = c^*/c_*: the highest density of the margin over the lowest, between its 5 % and 95 % quantiles, from a
    histogram with Freedman-Diaconis bins. None where the lowest is 0, or these margins are equal or none.

    An estimate with two biases: the least and the greatest of noisy counts lie too far apart, which raises it, and the
    tails, where the density is lower, are left out, which lowers it.
    """
    low, high = np.quantile(margin, TAILS)
    inside = margin[(margin >= low) & (margin <= high)]
    if low == high or not len(inside):
        return None
    width = 2 * np.subtract(*np.quantile(inside, [0.75, 0.25])) * len(inside) ** (-1 / 3)
    bins = min(_DENSITY_BINS, math.ceil((high - low) / width)) if width > 0 else 1
    counts, _ = np.histogram(inside, bins, (low, high))
    return float(counts.max() / counts.min()) if counts.min() else None


def theorem_bound(s: Floats, s_prompt: Floats, first: Sequence[PureSet], last: Sequence[PureSet]) -> PurityBound:
    """Rounds from e_0, the smallest pure e of the first policy, to e_end, that of the last one, by the proof of Theorem
    5.3: Eq. 17 at alpha = 1 (alpha < 1 of Eq. 8 cannot be measured), at the median R(x, y_prompt) in L(e_0).

    `s`, `s_prompt`: rewards of all pairs, mapped to [0, 1] here. e_0 and e_end are taken at the strictest purity that
    both policies reach. The theorem puts 1 and 1/|V| for R(x, y_prompt): its condition (3) is then the logarithm of a
    negative number for every e_0 above 1/|V|, and says nothing.
    """
    low = float(min(s.min(), s_prompt.min()))
    scale = float(max(s.max(), s_prompt.max())) - low or 1.0
    margin = (s_prompt - s) / scale
    l = density_ratio(margin)  # noqa: E741
    reached = [(a.percent, a.e, b.e) for a, b in zip(first, last, strict=True) if a.e is not None and b.e is not None]
    if not reached:
        lacking = "first" if all(a.e is None for a in first) else "last"
        says = f"no level set is pure for the {lacking} policy, at 90 % either; the theorem starts from one"
        return PurityBound(l=l, says=says)
    percent, *ends = max(reached)
    e_0, e_end = (e / scale for e in ends)
    r = float(np.median((s_prompt[margin >= e_0] - low) / scale))
    rounds, says = None, ""
    if l is None:
        says = "the margins' density is 0 somewhere between its 5 % and 95 % quantiles, so l has no bound"
    elif e_end >= e_0:
        says = "e did not fall from the first policy to the last, so there is no progress to bound"
    elif r <= e_0:
        says = "the median R(x, y_prompt) of L(e_0) is e_0 itself, so the logarithm has no bound"
    else:
        rounds = 6 * l / e_end * math.log((r - e_end) / (r - e_0))
    return PurityBound(percent=percent, e_0=e_0, e_end=e_end, l=l, median_reward=r, rounds_by_proof=rounds, says=says)
