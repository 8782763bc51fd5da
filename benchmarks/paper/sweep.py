"""The frontier of a task: every brake of every method trained and evaluated, learning rates chosen at one KL.

A point's training and evaluation are done by one worker. What was found goes into the record beside the pages: what is
there is never made again, on this machine or another one, and the pages are of what is there. The math is in
`frontier`, the tables in `pages`.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.paper.commands import evaluate, train
from benchmarks.paper.frontier import along, distance
from benchmarks.paper.methods import LEARNING_RATES, RATE, START, Method, Run, frontier
from benchmarks.paper.pages import Tried, sample_queries, write_pages
from benchmarks.paper.points import BASE, Record, evaluated, folder, metrics
from benchmarks.paper.tasks import Task
from ple_data.common.digests import model_digest
from schemas.files import write_atomic

TUNED_AT = 10.0
"""KL to the start policy, in nats a response, at which a method's learning rates are compared."""
TRIED_BRAKES = slice(1, 3)
"""The brakes that each learning rate is tried with: the middle ones."""
BEYOND = {min(LEARNING_RATES): 1e-4, max(LEARNING_RATES): 1e-2}
"""The learning rate that is tried too where an end of LEARNING_RATES is the best of them."""


def sweep(task: Task, results: Path, seeds: list[int], workers: int, rates: dict[str, float] | None) -> None:
    """Every point that is not in the record yet, then the pages.

    `rates`: by method, the learning rate to take; where it is None, those of the pages that are there, else rates are
    tried with the first seed.
    """
    known = known_rates(task, results)
    if rates is not None:
        tried = known[1] if known and known[0] == rates else {}
    elif known:
        rates, tried = known
    else:
        rates, tried = choose_rates(task, frontier(task), seeds[0], workers)
        results.mkdir(parents=True, exist_ok=True)  # kept before any page, as the choice takes hours
        write_atomic(results / f"{task.name}-frontier.json", json.dumps({"rates": rates, "tried": tried}) + "\n")
    record = record_of(task, results)
    points = all_points(task, seeds, rates)
    failed = []
    for whole, seed in product((True, False), seeds):  # the methods of all seeds before the ablations of any
        runs = [run for run in points if run.seed == seed and (run.method.ablates is None) == whole]
        failed += finish(task, runs, "unseen", workers, record)
        write_pages(task, results, points, rates, tried, record)
    end_with(failed)


def show_points(
    task: Task, results: Path, seeds: list[int], workers: int, rates: dict[str, float] | None, only: list[str] | None
) -> None:
    """The points of `only` from the commands alone, printed beside those of the record, which are not looked at before.

    They are the same where the start policy is; another processor trains it to slightly other weights.
    """
    wanted = select(task, only)
    if rates is None and task.rate is None:
        names = {method.ablates or method.name for method, _ in wanted}
        rates, _ = choose_rates(task, [m for m in frontier(task) if m.name in names], seeds[0], workers)
    rates = rates or one_rate(task)
    runs = [point(method, brake, seed, rates) for seed in seeds for method, brake in wanted]
    failed = finish(task, runs, "unseen", workers)
    record, start = record_of(task, results), model_digest(START)
    for run in runs:
        if place := evaluated(run, "unseen"):
            found = {"point": run.label, "seed": run.seed, "start": start, **metrics(place, run.label)}
            if kept := record.read(run.seed).get(run.label):
                found |= {"recorded": {"start": record.start(run.seed), **kept.metrics}}
            print(json.dumps(found))
    end_with(failed)


def is_whole(task: Task, results: Path, seeds: list[int]) -> bool:
    """Whether the record has every point, so that nothing is left but pages."""
    known = known_rates(task, results)
    record = record_of(task, results)
    return known is not None and all(run.label in record.labels(run.seed) for run in all_points(task, seeds, known[0]))


def record_of(task: Task, results: Path) -> Record:
    queries = pl.read_parquet("unseen.parquet")["id"].to_list() if Path("unseen.parquet").exists() else []
    return Record(results / f"{task.name}-frontier", tuple(sample_queries(queries)))


def known_rates(task: Task, results: Path) -> tuple[dict[str, float], Tried] | None:
    """The learning rates of a task's pages, and what they were chosen by; of a task that has one rate, that one."""
    if task.rate is not None:
        return one_rate(task), {}
    path = results / f"{task.name}-frontier.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    tried = {
        name: {float(rate): [(kl, reward) for kl, reward in curve] for rate, curve in own.items()}
        for name, own in found["tried"].items()
    }
    return found["rates"], tried


def one_rate(task: Task) -> dict[str, float]:
    return {} if task.rate is None else {method.name: task.rate for method in frontier(task)}


def choose_rates(task: Task, methods: Iterable[Method], seed: int, workers: int) -> tuple[dict[str, float], Tried]:
    """By tuned method, the best of LEARNING_RATES, or of one more where an end of them is best; what chose it."""
    tuned = {method.name: method for method in methods if method.tuned}
    tried = try_rates(task, dict.fromkeys(tuned.values(), LEARNING_RATES), seed, workers)
    best = {name: best_rate(name, own) for name, own in tried.items()}
    more = {tuned[name]: (BEYOND[rate],) for name, rate in best.items() if rate in BEYOND}
    for name, own in try_rates(task, more, seed, workers).items():
        tried[name] = dict(sorted((tried[name] | own).items()))
        best[name] = best_rate(name, tried[name])
    return best, tried


def all_points(task: Task, seeds: list[int], rates: dict[str, float]) -> list[Run]:
    return [point(method, brake, seed, rates) for seed in seeds for method, brake in select(task, None)]


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


def try_rates(task: Task, rates: dict[Method, tuple[float, ...]], seed: int, workers: int) -> Tried:
    """Each method with each of its learning rates and the middle brakes, on the validation queries."""
    runs = [Run(m, rate, seed, brake) for m in rates for rate in rates[m] for brake in m.brakes[TRIED_BRAKES]]
    end_with(finish(task, runs, "validation", workers))
    start = kl_and_reward(folder("validation", seed), BASE) if runs else (0.0, 0.0)
    tried: Tried = {method.name: {rate: [start] for rate in own} for method, own in rates.items()}
    for run in runs:
        if place := evaluated(run, "validation"):
            tried[run.method.name][run.learning_rate].append(kl_and_reward(place, run.label))
    return tried


def kl_and_reward(evaluation: Path, label: str) -> tuple[float, float]:
    found = metrics(evaluation, label)
    return found["kl"]["mean"], found["reward"]["mean"]


def best_rate(name: str, tried: dict[float, list[tuple[float, float]]]) -> float:
    """The learning rate with the highest training reward at TUNED_AT, of those that go so far; where none does, at the
    largest KL that all of them reach.

    Points of a rate, the start policy's first, are joined as those of a curve.
    """
    curves = {rate: np.array(curve).T for rate, curve in tried.items() if len(curve) > 1}
    if not curves:
        raise SystemExit(f"every learning rate of {name} diverged")
    far = {rate: curve for rate, curve in curves.items() if curve[0].max() >= TUNED_AT} or curves
    level = min(TUNED_AT, *(kl.max() for kl, _ in far.values()))
    at = {rate: along(distance(kl)[:, None], reward[:, None], np.sqrt(level))[0] for rate, (kl, reward) in far.items()}
    return max(at, key=lambda rate: at[rate])


def finish(task: Task, runs: list[Run], queries: str, workers: int, record: Record | None = None) -> list[str]:
    """Train and evaluate what is not there yet, several at once; says how long the rest will take → what failed."""
    missing = [run for run in runs if not (run.label in record.labels(run.seed) if record else evaluated(run, queries))]
    start = model_digest(START) if record and missing else ""
    for seed in {run.seed for run in missing}:
        base = folder(queries, seed)
        evaluate(task, [], f"{queries}.parquet", base, seed=seed, threads=None)
        if record:
            record.add(seed, BASE, base, start, {})
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
            if record:
                record.add_diverged(run.seed, run.label)
            return
        place = folder(queries, run.seed, run.label)
        begin_with(folder(queries, run.seed), place)
        evaluate(task, [run], f"{queries}.parquet", place, seed=run.seed, threads=None)
        if record:
            record.add(run.seed, run.label, place, start, run.costs())
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
    return failed


def end_with(failed: list[str]) -> None:
    """End the program where runs failed; the others are done."""
    if failed:
        raise SystemExit("\n".join(failed))


def begin_with(start: Path, place: Path) -> None:
    """Let an evaluation find the start policy's answers, and what was computed of them, where it begins."""
    if not place.exists():
        copy = place.parent / f".{place.name}"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(start, copy, ignore=shutil.ignore_patterns("eval.*"))
        copy.rename(place)
