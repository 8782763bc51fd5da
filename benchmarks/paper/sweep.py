"""The frontier of a task: every brake of every method trained and evaluated, learning rates chosen at one KL.

A point's training and evaluation are done by one worker, and its evaluation lies in a folder of its own: what is there
is never made again, and the tables are of what is there. The math is in `frontier`, the tables in `pages`.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.paper.commands import evaluate, train
from benchmarks.paper.frontier import along
from benchmarks.paper.methods import LEARNING_RATES, MAIN, RATE, Method, Run, frontier
from benchmarks.paper.pages import Tried, write_pages
from benchmarks.paper.points import BASE, evaluated, folder, metrics
from benchmarks.paper.tasks import Task

TUNED_AT = 10.0
"""KL to the start policy, in nats a response, at which a method's learning rates are compared."""
TRIED_BRAKES = slice(1, 3)
"""The brakes that each learning rate is tried with: the middle ones."""


def sweep(
    task: Task, results: Path, seeds: list[int], workers: int, rates: dict[str, float] | None, only: list[str] | None
) -> None:
    """Every point that is not there yet, then the pages; of `only` the points alone, shown instead.

    `rates`: by method, the learning rate to take; where it is None, rates are tried with the first seed.
    """
    wanted = select(task, only)
    tried: Tried = {}
    if rates is None and task.rate is not None:
        rates = {method.name: task.rate for method in frontier(task)}
    elif rates is None:
        names = {method.ablates or method.name for method, _ in wanted}
        tuned = [method for method in MAIN if method.tuned and method.name in names]
        tried = try_rates(task, tuned, seeds[0], workers)
        rates = {name: best_rate(own) for name, own in tried.items()}
    points = [point(method, brake, seed, rates) for seed in seeds for method, brake in wanted]
    for seed, group in product(seeds, (True, False)):  # the methods of a seed before their ablations
        runs = [run for run in points if run.seed == seed and (run.method.ablates is None) == group]
        finish(task, runs, "unseen", workers)
        for run in runs if only else ():
            if place := evaluated(run, "unseen"):
                print(json.dumps({"point": run.label, "seed": run.seed, **metrics(place, run.label)}))
        if not only:
            write_pages(task, results, points, rates, tried)


def select(task: Task, only: list[str] | None) -> list[tuple[Method, float]]:
    """The points METHOD:BRAKE, or all of each METHOD, in the order of the tables; all where none is named."""
    methods = frontier(task)
    every = {f"{method.name}:{brake:g}": (method, brake) for method in methods for brake in method.brakes}
    chosen = [point for name, point in every.items() if not only or name in only or point[0].name in only]
    known = {*every, *(method.name for method in methods)}
    if unknown := [name for name in only or [] if name not in known]:
        raise SystemExit(f"--only {unknown[0]}: no such point; there are {', '.join(every)}")
    return chosen


def point(method: Method, brake: float, seed: int, rates: dict[str, float]) -> Run:
    """The run of a point; an ablation has the learning rate of what it ablates."""
    if method.brake == RATE:
        return Run(method, brake, seed)
    if (name := method.ablates or method.name) not in rates:
        raise SystemExit(f"--rates has no learning rate of {name}: leave it out, and some are tried")
    return Run(method, rates[name], seed, brake)


def try_rates(task: Task, methods: list[Method], seed: int, workers: int) -> Tried:
    """Each method with each learning rate and the middle brakes, on the validation queries."""
    runs = [Run(m, rate, seed, brake) for m in methods for rate in LEARNING_RATES for brake in m.brakes[TRIED_BRAKES]]
    finish(task, runs, "validation", workers)
    start = kl_and_reward(folder("validation", seed), BASE) if runs else (0.0, 0.0)
    tried: Tried = {method.name: {rate: [start] for rate in LEARNING_RATES} for method in methods}
    for run in runs:
        if place := evaluated(run, "validation"):
            tried[run.method.name][run.learning_rate].append(kl_and_reward(place, run.label))
    return tried


def kl_and_reward(evaluation: Path, label: str) -> tuple[float, float]:
    found = metrics(evaluation, label)
    return found["kl"]["mean"], found["reward"]["mean"]


def best_rate(tried: dict[float, list[tuple[float, float]]]) -> float:
    """The learning rate with the highest training reward at TUNED_AT, or at the largest KL that any reaches."""
    curves = {rate: np.array(curve).T for rate, curve in tried.items()}
    level = min(TUNED_AT, max(kl.max() for kl, _ in curves.values()))
    return max(
        (along(kl[:, None], reward[:, None], level)[0], rate)
        for rate, (kl, reward) in curves.items()
        if kl.max() >= level
    )[1]


def finish(task: Task, runs: list[Run], queries: str, workers: int) -> None:
    """Train and evaluate what is not there yet, several at once; says how long the rest will take."""
    for seed in {run.seed for run in runs}:
        evaluate(task, [], f"{queries}.parquet", folder(queries, seed), seed=seed, threads=None)
    missing = [run for run in runs if not evaluated(run, queries)]
    took: list[float] = []
    failed: list[str] = []

    def one(run: Run) -> None:
        try:
            finish_one(run)
        except SystemExit as error:
            failed.append(f"{run.directory}: {error}")

    def finish_one(run: Run) -> None:
        began = time.monotonic()
        if not train(task, run):
            return
        place = folder(queries, run.seed, run.label)
        begin_with(folder(queries, run.seed), place)
        evaluate(task, [run], f"{queries}.parquet", place, seed=run.seed, threads=None)
        took.append(time.monotonic() - began)
        kl, reward = kl_and_reward(place, run.label)
        left = len(missing) - len(took)
        print(
            f"{run.directory}: {took[-1]:.0f} s, KL {kl:.1f}, training reward {reward:.2f}; {left} of {len(runs)} "
            f"{queries} points left, about {left * sum(took) / len(took) / workers / 3600:.1f} h",
            file=sys.stderr,
            flush=True,
        )

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, missing))
    if failed:
        raise SystemExit("\n".join(failed))


def begin_with(start: Path, place: Path) -> None:
    """Let an evaluation find the start policy's answers, and what was computed of them, where it begins."""
    if not place.exists():
        copy = place.parent / f".{place.name}"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(start, copy, ignore=shutil.ignore_patterns("eval.*"))
        copy.rename(place)
