"""Section 5 of the paper as numbers: how pure the level sets L(e) = {x : s_prompt - s >= e} are for a policy, the
smallest pure e, and Theorem 5.3's bound on the number of rounds.

Takes arrays of margins and log-probabilities and gives the forms of `schemas.reports`; reads no file and runs no model.
Purity compares log pi(y_prompt|x) with log pi(y|x), strictly: a tie is not pure. Counts are integers, so that "95 %" of
20 pairs is 19 and nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Scored:
    """Pairs under one policy, arrays of one length: margin = s_prompt - s, log_ratio = log pi(y_prompt|x) - log pi(y|x)
    (NaN where a log-probability is missing), and the round of the pair.
    """

    margin: Floats
    log_ratio: Floats
    round: NDArray[np.int64]

    def select(self, mask: NDArray[np.bool_]) -> Scored:
        return Scored(self.margin[mask], self.log_ratio[mask], self.round[mask])


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


def count(pairs: Scored, round: int | None = None) -> PurityCounts:
    """What one policy does on the pairs of a round, or on all of them; pairs without a log-probability are left out."""
    mask = ~np.isnan(pairs.log_ratio)
    if round is not None:
        mask &= pairs.round == round
    kept = pairs.select(mask)
    return PurityCounts(
        round=round,
        pairs=len(kept.margin),
        ranked=int((kept.margin != 0).sum()),
        agree=int(_agrees(kept).sum()),
        positive=int((kept.margin > 0).sum()),
        pure_sets=[smallest_pure(kept.margin, kept.log_ratio, percent) for percent in PERCENTS],
    )


def _agrees(pairs: Scored) -> NDArray[np.bool_]:
    return np.sign(pairs.margin) * np.sign(pairs.log_ratio) > 0


def bin_edges(margin: Floats) -> list[float]:
    """Edges of margin bins of about equal count, `SIDE_BINS` below 0 and as many above; 0 is an edge."""
    edges = {0.0}
    shares = np.linspace(0, 1, SIDE_BINS + 1)
    for side, outer in ((margin[margin < 0], shares[:-1]), (margin[margin > 0], shares[1:])):
        if len(side):
            edges |= set(np.quantile(side, outer).tolist())
    return sorted(edges)


def binned(pairs: Scored, edges: Sequence[float]) -> list[PurityBin]:
    """Agreement by margin in the bins between `edges`; an inner edge belongs to the bin farther from 0."""
    kept = pairs.select(~np.isnan(pairs.log_ratio) & (pairs.margin != 0))
    agrees = _agrees(kept)
    result = []
    for low, high in itertools.pairwise(edges):
        if low >= 0:
            inside = (kept.margin >= low) & ((kept.margin < high) | (high == edges[-1]))
        else:
            inside = (kept.margin <= high) & ((kept.margin > low) | (low == edges[0]))
        result.append(PurityBin(low=low, high=high, pairs=int(inside.sum()), agree=int(agrees[inside].sum())))
    return result


def density_bounds(margin: Floats) -> tuple[float, float] | None:
    """c_* and c^*: the lowest and highest density of the margin between its 5 % and 95 % quantiles, from a histogram
    with Freedman-Diaconis bins. None where all these margins are equal.

    An estimate of l = c^*/c_* with two biases: the least and the greatest of noisy counts lie too far apart, which
    raises it, and the tails, where the density is lower, are left out, which lowers it.
    """
    low, high = np.quantile(margin, TAILS)
    inside = margin[(margin >= low) & (margin <= high)]
    if low == high:
        return None
    spread = np.subtract(*np.quantile(inside, [0.75, 0.25]))
    width = 2 * spread * len(inside) ** (-1 / 3)
    number = min(_DENSITY_BINS, max(1, math.ceil((high - low) / width))) if width > 0 else 1
    counts, edges = np.histogram(inside, bins=number, range=(low, high))
    density = counts / (len(margin) * np.diff(edges))
    return float(density.min()), float(density.max())


def theorem_bound(
    s: Floats,
    s_prompt: Floats,
    first: Sequence[PureSet],
    last: Sequence[PureSet],
    vocabulary: int,
) -> PurityBound:
    """Theorem 5.3 with what can be measured in it: e_0 of the first policy and e_end = epsilon of the last, both at the
    strictest purity that both reach, rewards mapped to [0, 1], l from the margins' density.

    `s`, `s_prompt`: rewards of all pairs; `vocabulary`: |V|. alpha < 1 of Eq. 8 cannot be measured (it needs the
    optimal policy): (1) is turned into a limit on it, (3) as printed does not contain it, Eq. 17 is taken at alpha = 1.
    """
    values: dict[str, float | int | None] = dict.fromkeys(PurityBound.model_fields)
    values["vocabulary"] = vocabulary
    low, high = float(min(s.min(), s_prompt.min())), float(max(s.max(), s_prompt.max()))
    values |= {"reward_low": low, "reward_high": high}
    if low == high:
        return _bound(values, "all rewards are equal: there is no margin to speak of")
    r_prompt = (s_prompt - low) / (high - low)
    margin = (s_prompt - s) / (high - low)
    if bounds := density_bounds(margin):
        values |= {"density_low": bounds[0], "density_high": bounds[1]}
        if bounds[0] > 0:
            values["l"] = bounds[1] / bounds[0]

    reached = [(a, b) for a, b in zip(first, last, strict=True) if a.e is not None and b.e is not None]
    if not reached:
        lacking = "first" if all(a.e is None for a in first) else "last"
        return _bound(
            values, f"no level set is pure for the {lacking} policy, at 90 % either; the theorem starts from one"
        )
    pure_0, pure_end = max(reached, key=lambda pair: pair[0].percent)
    assert pure_0.e is not None
    assert pure_end.e is not None
    e_0, epsilon = pure_0.e / (high - low), pure_end.e / (high - low)
    values |= {"percent": pure_0.percent, "e_0": e_0, "e_end": epsilon, "epsilon": epsilon}
    values["alpha_limit"] = _alpha_limit(e_0, epsilon)
    if values["l"] is None:
        return _bound(
            values, "the margins' density is 0 somewhere between its 5 % and 95 % quantiles, so l has no bound"
        )
    l = float(values["l"])  # noqa: E741
    remains = [_printed_bound(values, l, e_0, epsilon, vocabulary)]
    if epsilon >= e_0:
        remains.append("e did not fall from the first policy to the last, so there is no progress to bound")
    else:
        r = float(np.median(r_prompt[margin >= e_0]))
        values["median_reward"] = r
        if r > e_0:
            values["rounds_by_proof"] = 6 * l / epsilon * math.log((r - epsilon) / (r - e_0))
    return _bound(values, "; ".join(remains))


def _alpha_limit(e_0: float, epsilon: float) -> float | None:
    """The largest alpha <= 1 with e_0 >= (alpha + epsilon/6) / (1 + alpha), condition (1); None where there is none."""
    if e_0 <= epsilon / 6:
        return None
    return 1.0 if e_0 >= 1 else min(1.0, (e_0 - epsilon / 6) / (1 - e_0))


def _printed_bound(values: dict[str, float | int | None], l: float, e_0: float, epsilon: float, vocabulary: int) -> str:  # noqa: E741
    """Sets `rounds` to condition (3) as printed, or says why it is no number."""
    if e_0 < 1 / vocabulary and epsilon < 1:
        values["rounds"] = 6 * l / epsilon * math.log((1 - epsilon) / (1 / vocabulary - e_0))
        return "condition (3) as printed gives a number"
    return (
        "condition (3) as printed takes the logarithm of (1 - epsilon) / (1/|V| - e_0), and "
        f"1/|V| = {1 / vocabulary:.3g} is not above e_0 = {e_0:.3g}: the logarithm of a negative number, so the "
        "printed bound says nothing (with (1), which asks for e_0 > epsilon/6, it could only for "
        f"epsilon < {6 / vocabulary:.3g})"
    )


def _bound(values: dict[str, float | int | None], says: str) -> PurityBound:
    return PurityBound(**{**values, "says": says})  # type: ignore[arg-type]
