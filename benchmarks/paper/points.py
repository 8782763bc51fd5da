"""What `ple eval` found of each point of the frontier, read from its folder: metrics, and means on draws of queries.

A folder holds the start policy and one trained policy, so that the KL of every point is to the same start.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.paper.frontier import weights
from benchmarks.paper.methods import Method, Run
from benchmarks.paper.tables import read_evaluation

BASE = "base"
METRICS = ("kl", "judge", "reward", "perplexity", "entropy", "distinct_1", "length", "truncated")
"""KL in nats a response; judge: the unseen reward model; reward: that which trained; entropy in nats a token."""


def folder(queries: str, seed: int, label: str = BASE) -> Path:
    """Where the evaluation of a policy lies; `queries`: unseen or validation."""
    return Path("eval", queries, f"seed={seed}", label)


def evaluated(run: Run, queries: str) -> Path | None:
    """The run's evaluation where it is whole."""
    found = folder(queries, run.seed, run.label)
    return found if (found / "eval.json").exists() else None


def metrics(evaluation: Path, label: str) -> dict[str, dict[str, Any]]:
    """METRICS of one policy of an evaluation, each with its interval over queries."""
    report = json.loads((evaluation / "eval.json").read_text())
    names = {("reward" if model["trained"] else "judge"): model["name"] for model in report["reward_models"]}
    own = next(policy["metrics"] for policy in report["policies"] if policy["label"] == label)
    return {name: own[f"reward:{names[name]}" if name in names else name] for name in METRICS}


@dataclass(frozen=True)
class Point:
    """One policy on the unseen queries: `metrics`, and its answers, a row a query."""

    metrics: dict[str, dict[str, Any]]
    rows: pl.DataFrame

    @cached_property
    def draws(self) -> dict[str, np.ndarray]:
        """KL, rewards and perplexity on all queries and on draws of them, [1 + draws] each."""
        own = self.rows.select(
            pl.col("own_logps").sub("first_logps").alias("kl"),
            pl.col("reward").alias("judge"),
            pl.col("trained").alias("reward"),
            pl.col("reference_nll", "reference_tokens").cast(pl.Float64),
        )
        found = dict(zip(own.columns, (weights(own.height) @ own.to_numpy()).T, strict=True))
        nats = found.pop("reference_nll") / found.pop("reference_tokens")
        return found | {"perplexity": np.exp(nats)}


def read_point(evaluation: Path, label: str, seed: int) -> Point:
    rows = read_evaluation(evaluation / "eval.parquet", seed).filter(label=label).sort("query_id")
    return Point(metrics(evaluation, label), rows)


@dataclass(frozen=True)
class Curve:
    """The points of one method and seed, tightest brake first; the start policy in front."""

    method: Method
    seed: int
    start: Point
    points: dict[Run, Point]

    @cached_property
    def draws(self) -> dict[str, np.ndarray]:
        """[points, draws] of KL, judge, reward and perplexity."""
        every = [self.start, *self.points.values()]
        return {name: np.array([point.draws[name] for point in every]) for name in self.start.draws}


def read_curves(runs: Iterable[Run]) -> dict[str, list[Curve]]:
    """By method, the curve of each seed of those runs that are evaluated."""
    found: dict[tuple[Method, int], dict[Run, Point]] = {}
    for run in runs:
        if place := evaluated(run, "unseen"):
            found.setdefault((run.method, run.seed), {})[run] = read_point(place, run.label, run.seed)
    starts = {seed: read_point(folder("unseen", seed), BASE, seed) for _, seed in found}
    curves: dict[str, list[Curve]] = {}
    for (method, seed), points in found.items():
        curves.setdefault(method.name, []).append(Curve(method, seed, starts[seed], points))
    return curves
