"""The frontier's curves compared: at equal KL, by area, and each method's points with another one's curve.

Gives plain dictionaries, as they stand in the JSON; the math is in `frontier`, the text in `pages`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.paper.frontier import along, area, estimate, reaches
from benchmarks.paper.methods import FRONTIER, MAIN
from benchmarks.paper.points import Curve, Point

LEVELS = (8.0, 14.0, 20.0)
"""KL to the start policy, in nats a response, at which methods are compared; areas go up to the last."""
REWARDS = {"judge": "unseen judge", "reward": "training reward"}
FORMS = ("stable-ple", "ple-residual", "ple-residual-sums", "ple")
"""PLE's, from which every other method is taken away."""
SIGN_ALONE = ("dpo-means", "ple-residual", "residual, the margin's sign alone (DPO by length)")
Curves = dict[str, list[Curve]]


def at_equal_kl(curves: Curves, level: float) -> dict[str, Any]:
    """By method that has points on both sides of `level` in every seed: their KL, each reward at `level`, and of PLE's
    forms less each other method.
    """
    seeds = max(map(len, curves.values()))
    inside = {
        m.name: curves[m.name]
        for m in MAIN
        if len(curves.get(m.name, ())) == seeds and all(around(curve, level) for curve in curves[m.name])
    }
    found: dict[str, Any] = {name: {"between": between(own, level)} for name, own in inside.items()}
    for what in REWARDS:
        draws = {n: [along(c.draws["distance"], c.draws[what], level**0.5) for c in own] for n, own in inside.items()}
        for name in inside:
            found[name][what] = shown(draws[name])
        for form in draws.keys() & FORMS:
            found[form][f"{what}_less"] = {
                other: shown([own - base for own, base in zip(draws[form], draws[other], strict=True)])
                for other in draws
                if other not in FORMS
            }
    return found


def around(curve: Curve, level: float) -> tuple[float, float] | None:
    """The KL of the points next to `level`, below and above; None where it has none on one side."""
    kls = [float(point.draws["kl"][0]) for point in curve.points.values()]
    below, above = [kl for kl in kls if kl <= level], [kl for kl in kls if kl >= level]
    return (max(below), min(above)) if below and above else None


def between(curves: list[Curve], level: float) -> list[float]:
    """The lowest and highest KL over seeds of the points between which `level` lies."""
    ends = [found for curve in curves if (found := around(curve, level))]
    return [min(low for low, _ in ends), max(high for _, high in ends)]


def areas(curves: Curves, upto: float) -> dict[str, Any]:
    """By method that goes so far in every seed: the mean height of its curve over the root of KL, from the start policy
    on.
    """
    seeds = max(map(len, curves.values()))
    return {
        m.name: {
            what: shown([area(c.draws["distance"], c.draws[what], upto**0.5) for c in curves[m.name]])
            for what in REWARDS
        }
        for m in MAIN
        if len(curves.get(m.name, ())) == seeds and all(goes(curve, upto) for curve in curves[m.name])
    }


def at_own_kl(curves: Curves, name: str, whole: str) -> dict[str, Any] | None:
    """A method's points less the curve of another at their own KL, mean over its brakes, of those seeds that have a
    point within the curve; None where no seed has. only_seeds: these, where others have none. from_start: some points
    lie between the start policy and the curve's first point.
    """
    of = {curve.seed: curve for curve in curves.get(whole, ())}
    own = [curve for curve in curves.get(name, ()) if curve.seed in of]
    points = {c.seed: {r: p for r, p in c.points.items() if goes(of[c.seed], p.draws["kl"][0])} for c in own}
    inside = {seed: seen for seed, seen in points.items() if seen}
    if not inside:
        return None
    within = (around(of[seed], point.draws["kl"][0]) for seed, seen in inside.items() for point in seen.values())
    gaps = {what: [mean_gap(seen.values(), of[seed], what) for seed, seen in inside.items()] for what in REWARDS}
    return {
        "only_seeds": list(inside) if len(inside) < len(own) else [],
        "brakes": sorted({run.braked for seen in inside.values() for run in seen}),
        "kl": fmean(point.metrics["kl"]["mean"] for seen in inside.values() for point in seen.values()),
        "from_start": not all(within),
        **{what: shown(gap) for what, gap in gaps.items()},
    }


def goes(curve: Curve, level: float) -> bool:
    return reaches(curve.draws["kl"], level)


def shown(draws: Sequence[np.ndarray]) -> dict[str, Any]:
    """A number over seeds as it is written: mean, interval, and each seed's."""
    return estimate(draws).model_dump() | {"by_seed": [float(own[0]) for own in draws]}


def ablations(curves: Curves) -> list[dict[str, Any]]:
    """Every ablation that there is, and DPO by length as one of the residual form, less the whole method at the
    ablation's own KL.
    """
    pairs = [(m.name, m.ablates, m.title) for m in FRONTIER if m.ablates] + [SIGN_ALONE]
    return [
        {"method": name, "title": title, "ablates": whole, **(at_own_kl(curves, name, whole) or {})}
        for name, whole, title in pairs
        if name in curves
    ]


def mean_gap(points: Iterable[Point], whole: Curve, what: str) -> np.ndarray:
    """[draws]: the points less `whole` at their own KL."""
    gaps = [p.draws[what] - along(whole.draws["distance"], whole.draws[what], p.draws["distance"]) for p in points]
    return np.mean(gaps, axis=0)
