"""What `ple eval` found of each point of the frontier: metrics, and means on draws of queries.

A folder holds the start policy and one trained policy, so that the KL of every point is to the same start. What the
pages need of it is kept in a record beside them, from which another machine goes on.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.paper.frontier import distance, weights
from benchmarks.paper.methods import Method, Run
from benchmarks.paper.tables import PACKAGES, read_evaluation
from benchmarks.side_by_side import made_with
from schemas.files import writing_atomic

BASE = "base"
METRICS = ("kl", "judge", "reward", "perplexity", "entropy", "distinct_1", "length", "truncated")
"""KL in nats a response; judge: the unseen reward model; reward: that which trained; entropy in nats a token."""
NUMBERS = ["kl", "judge", "reward", "reference_nll", "reference_tokens"]


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
    """One policy on the unseen queries: `metrics`, its answers, a row a query, with the columns NUMBERS, and `costs`:
    tokens sampled and trained on, updates; empty for the start policy."""

    metrics: dict[str, dict[str, Any]]
    rows: pl.DataFrame
    costs: dict[str, int]

    @cached_property
    def draws(self) -> dict[str, np.ndarray]:
        """KL, its root, rewards and perplexity on all queries and on draws of them, [1 + draws] each."""
        own = self.rows.select(pl.col(NUMBERS).cast(pl.Float64))
        found = dict(zip(own.columns, (weights(own.height) @ own.to_numpy()).T, strict=True))
        nats = found.pop("reference_nll") / found.pop("reference_tokens")
        return found | {"distance": distance(found["kl"]), "perplexity": np.exp(nats)}


def read_point(evaluation: Path, label: str, seed: int, costs: dict[str, int]) -> Point:
    rows = read_evaluation(evaluation / "eval.parquet", seed).filter(label=label).sort("query_id")
    kl = pl.col("own_logps").sub("first_logps").alias("kl")
    named = pl.col("reward").alias("judge"), pl.col("trained").alias("reward")
    return Point(
        metrics(evaluation, label),
        rows.select("query_id", "x", "y", kl, *named, "reference_nll", "reference_tokens"),
        costs,
    )


@dataclass(frozen=True)
class Record:
    """The evaluated points of a task's frontier, one Parquet file a seed: numbers of each query, metrics beside them.

    All points of a seed are to one start policy, which the file names by its digest. `texts`: queries whose answers
    are kept too.
    """

    folder: Path
    texts: tuple[str, ...] = ()
    lock: threading.Lock = field(default_factory=threading.Lock, compare=False)

    def path(self, seed: int) -> Path:
        return self.folder / f"seed={seed}.parquet"

    def labels(self, seed: int, start: str | None = None) -> set[str]:
        """Of the policies that are there, and of the trainings that diverged. Ends the program where they began with
        another policy than `start`."""
        told = self._told(seed)
        if told and start not in (None, told["start"]):
            raise SystemExit(
                f"{self.path(seed)} has points of another start policy (made on another machine?): they do not "
                f"compare. Leave out seed {seed}, or remove the file to make all its points again."
            )
        return {*told.get("metrics", ()), *told.get("diverged", ())}

    def start(self, seed: int) -> str | None:
        """The digest of the start policy of a seed's points."""
        return self._told(seed).get("start")

    def diverged(self, seed: int) -> list[str]:
        """The labels of the trainings whose numbers left the numbers."""
        return list(self._told(seed).get("diverged", ()))

    def add_diverged(self, seed: int, label: str) -> None:
        """Keep that a training diverged; the start policy's point is there already."""
        with self.lock:
            told = self._told(seed)
            told["diverged"] = sorted({*told.get("diverged", ()), label})
            self._write(seed, pl.read_parquet(self.path(seed)), told)

    def add(self, seed: int, label: str, evaluation: Path, start: str, costs: dict[str, int]) -> None:
        """Keep a policy's point, and what it took; one that is there stays."""
        with self.lock:
            if label in self.labels(seed, start):
                return
            point, told = read_point(evaluation, label, seed, costs), self._told(seed)
            kept = pl.col("query_id").is_in(self.texts)
            rows = point.rows.select(
                pl.lit(label).alias("label"),
                "query_id",
                *(pl.when(kept).then(pl.col(text)).alias(text) for text in ("x", "y")),
                pl.col(NUMBERS).cast(pl.Float32),
            )
            before = [pl.read_parquet(self.path(seed))] if told else []
            told = {
                "version": 1,
                "start": start,
                "made_with": sorted({*told.get("made_with", ()), made_with(*PACKAGES)}),
                "metrics": told.get("metrics", {}) | {label: point.metrics},
                "costs": told.get("costs", {}) | {label: costs},
                "diverged": told.get("diverged", []),
            }
            self._write(seed, pl.concat([*before, rows]), told)

    def read(self, seed: int) -> dict[str, Point]:
        """By label."""
        told = self._told(seed)
        rows = pl.read_parquet(self.path(seed)).partition_by("label", as_dict=True) if told else {}
        return {label: Point(told["metrics"][label], own, told["costs"][label]) for (label,), own in rows.items()}

    def made_with(self, seeds: Iterable[int]) -> dict[str, list[int]]:
        """By machine and versions, the seeds whose points were made there."""
        found: dict[str, list[int]] = {}
        for seed in seeds:
            for made in self._told(seed).get("made_with", ()):
                found.setdefault(made, []).append(seed)
        return found

    def _write(self, seed: int, rows: pl.DataFrame, told: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with writing_atomic(self.path(seed)) as file:
            rows.write_parquet(file, metadata={"frontier": json.dumps(told)})

    def _told(self, seed: int) -> dict[str, Any]:
        path = self.path(seed)
        return dict(json.loads(pl.read_parquet_metadata(path)["frontier"])) if path.exists() else {}


@dataclass(frozen=True)
class Curve:
    """The points of one method and seed, tightest brake first; the start policy in front."""

    method: Method
    seed: int
    start: Point
    points: dict[Run, Point]

    @cached_property
    def draws(self) -> dict[str, np.ndarray]:
        """[points, draws] of KL, its root, judge, reward and perplexity."""
        every = [self.start, *self.points.values()]
        return {name: np.array([point.draws[name] for point in every]) for name in self.start.draws}


def read_curves(runs: Iterable[Run], record: Record) -> dict[str, list[Curve]]:
    """By method, the curve of each seed of those runs that are in the record."""
    runs = list(runs)
    seeds = {seed: record.read(seed) for seed in sorted({run.seed for run in runs})}
    found: dict[tuple[Method, int], dict[Run, Point]] = {}
    for run in runs:
        if point := seeds[run.seed].get(run.label):
            found.setdefault((run.method, run.seed), {})[run] = point
    curves: dict[str, list[Curve]] = {}
    for (method, seed), points in found.items():
        curves.setdefault(method.name, []).append(Curve(method, seed, seeds[seed][BASE], points))
    return curves
