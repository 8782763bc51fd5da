"""The pages of a task's frontier: raw JSON, curves with bands, tables at equal KL, ablations, answers as they came.

The numbers are of the record beside the pages; the math is in `frontier`. Trains and samples nothing.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.paper.frontier import along, area, estimate, reaches
from benchmarks.paper.methods import FRONTIER, MAIN, RATE, TABLES, Method, Run
from benchmarks.paper.points import METRICS, Curve, Point, Record, read_curves
from benchmarks.paper.tables import listed, save, wrapped
from benchmarks.paper.tasks import Task
from schemas.files import write_atomic
from schemas.reports import Estimate

LEVELS = (8.0, 14.0, 20.0)
"""KL to the start policy, in nats a response, at which methods are compared; areas go up to the last."""
REWARDS = {"judge": "unseen judge", "reward": "training reward"}
AGAINST = {"dpo": "DPO", "stable-ple": "stabilised PLE"}
"""Those from which every method is taken away."""
SIGN_ALONE = ("dpo-means", "ple-residual", "residual, the margin's sign alone (DPO by length)")
ANSWERS = 10
FLUENT = 250.0
"""Perplexity at which the picture ends; that of KL ends at twice the last level."""
Tried = dict[str, dict[float, list[tuple[float, float]]]]
"""By method and learning rate: KL and training reward on the validation queries, the start policy's first."""
Curves = dict[str, list[Curve]]
TITLES = {method.name: method.title for method in FRONTIER}


def write_pages(
    task: Task, results: Path, runs: list[Run], rates: dict[str, float], tried: Tried, kept: Record
) -> None:
    """TASK-frontier.md, .json and .png and TASK-answers.md in `results`, of those runs that are in the record."""
    curves = read_curves(runs, kept)
    seeds = sorted({curve.seed for own in curves.values() for curve in own})
    name = f"{task.name}-frontier"
    levels = {level: at_equal_kl(curves, level) for level in LEVELS}
    areas = compare(curves, lambda curve, what: area(curve.draws["kl"], curve.draws[what], LEVELS[-1]), LEVELS[-1])
    parts = ablations(curves)
    lines = [
        f"# {task.title}: rewards against the distance from the start policy",
        "",
        f"- Made by: `python -m benchmarks.paper {task.name} --frontier --seeds {','.join(map(str, seeds))} "
        f"{' '.join(f'--{name} {name.upper()}' for name in task.inputs)} --output runs/paper/{task.name}`",
        f"- Rounds: {task.rounds} rounds of {task.queries_per_round} queries; KL in nats a response, on own responses",
        *(f"- Seeds {', '.join(map(str, own))} with: {made}" for made, own in kept.made_with(seeds).items()),
        f"- Raw numbers: [{name}.json]({name}.json), query by query in {name}/; {datetime.now(UTC):%d %B %Y}",
        f"- Texts: [{task.name}-answers.md]({task.name}-answers.md)",
        "",
        f"![rewards against KL and against perplexity]({name}.png)",
        "",
        "Lines are means over seeds, bands the lowest and highest seed. A seed's curve joins the start policy and the "
        "method's points; the shortest one ends the line. Higher and further left is better.",
        *(line for level, found in levels.items() for line in table(f"At a KL of {level:g}", found, curves, level)),
        "",
        "Intervals are 95 % over queries (bootstrap) and seeds (Student's t), added in quadrature. Single seeds stand "
        "in round brackets. A method that does not go so far in every seed has no number.",
        *table(f"Mean reward along the curve, up to a KL of {LEVELS[-1]:g}", areas, curves, LEVELS[-1]),
        "",
        "## Ablations",
        "",
        "Each less the whole method at the same KL, which is interpolated; mean over the ablation's brakes.",
        "",
        "| ablation | brakes | KL | unseen judge, less the whole | training reward, less the whole |",
        "| --- | --- | --- | --- | --- |",
        *map(ablation_row, parts),
        *rates_table(tried),
        *every_point(curves),
    ]
    record = {
        "version": 1,
        "seeds": seeds,
        "levels": LEVELS,
        "rates": rates,
        "tried": tried,
        "start": {str(curve.seed): curve.start.metrics for curve in next(iter(curves.values()))},
        "equal_kl": levels,
        "area": areas,
        "ablations": parts,
        "points": [raw(run, point) for run, point in all_points(curves)],
        "diverged": {seed: labels for seed in seeds if (labels := kept.diverged(seed))},
    }
    results.mkdir(parents=True, exist_ok=True)
    draw(curves, results / f"{name}.png")
    write_atomic(results / f"{name}.json", json.dumps(record, indent=1) + "\n")
    for page, found in ((name, lines), (f"{task.name}-answers", answers(task, curves))):
        write_atomic(results / f"{page}.md", "\n".join(line for long in found for line in wrapped(long)) + "\n")


def at_equal_kl(curves: Curves, level: float) -> dict[str, Any]:
    """Each reward of each method at one KL, and less those of AGAINST."""
    return compare(curves, lambda curve, what: along(curve.draws["kl"], curve.draws[what], level), level)


def compare(curves: Curves, value: Any, level: float) -> dict[str, Any]:
    """By method and reward: `value` of its curves with intervals, and less AGAINST; those that do not reach `level` are
    left out.
    """
    seeds = max(map(len, curves.values()))
    far = [name for name, own in curves.items() if len(own) == seeds and all(goes(curve, level) for curve in own)]
    found: dict[str, Any] = {name: {} for name in far}
    for what in REWARDS:
        draws = {name: [value(curve, what) for curve in curves[name]] for name in far}
        for name in far:
            found[name][what] = shown(draws[name])
            for other in AGAINST.keys() & draws.keys() - {name}:
                less = [own - base for own, base in zip(draws[name], draws[other], strict=True)]
                found[name][f"{what}_less_{other}"] = shown(less)
    return found


def goes(curve: Curve, level: float) -> bool:
    return reaches(curve.draws["kl"], level)


def shown(draws: Sequence[np.ndarray]) -> dict[str, Any]:
    """A number over seeds as it is written: mean, interval, and each seed's."""
    return estimate(draws).model_dump() | {"by_seed": [float(own[0]) for own in draws]}


def cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    whole = str(Estimate(**{name: value for name, value in record.items() if name != "by_seed"}))
    return f"{whole} ({listed(record['by_seed'])})"


def table(title: str, found: dict[str, Any], curves: Curves, level: float) -> list[str]:
    """One line a method: both rewards, and less AGAINST."""
    head = [f"{name}{less}" for name in REWARDS.values() for less in ("", *(f", less {o}" for o in AGAINST.values()))]
    lines = ["", f"## {title}", "", f"| method | {' | '.join(head)} |", f"| --- {'| --- ' * len(head)}|"]
    for method in (*MAIN, *TABLES):
        if own := found.get(method.name):
            keys = [f"{what}{less}" for what in REWARDS for less in ("", *(f"_less_{other}" for other in AGAINST))]
            lines.append(f"| {method.title} | {' | '.join(cell(own.get(key)) for key in keys)} |")
        elif method.name in curves:
            end = min(curve.draws["kl"][:, 0].max() for curve in curves[method.name])
            lines.append(f"| {method.title} | ends at {end:.1f} {'| ' * len(head)}|")
    return lines


def ablations(curves: Curves) -> list[dict[str, Any]]:
    """Every ablation, and DPO by length as one of the residual form, less the whole method at the ablation's own KL."""
    pairs = [(m.name, m.ablates, m.title) for m in FRONTIER if m.ablates] + [SIGN_ALONE]
    found = []
    for name, whole, title in pairs:
        of = {curve.seed: curve for curve in curves.get(whole, ())}
        own = [curve for curve in curves.get(name, ()) if curve.seed in of]
        inside = {
            curve.seed: [p for p in curve.points.values() if goes(of[curve.seed], p.draws["kl"][0])] for curve in own
        }
        if own and all(inside.values()):
            less = {
                what: shown([mean_gap(inside[curve.seed], of[curve.seed], what) for curve in own]) for what in REWARDS
            }
            points = [point for seen in inside.values() for point in seen]
            brakes = sorted({run.braked for curve in own for run in curve.points})
            kl = fmean(point.metrics["kl"]["mean"] for point in points)
            found.append({"method": name, "title": title, "ablates": whole, "brakes": brakes, "kl": kl, **less})
    return found


def mean_gap(points: Sequence[Point], whole: Curve, what: str) -> np.ndarray:
    """[draws]: the points less `whole` at their own KL."""
    gaps = [p.draws[what] - along(whole.draws["kl"], whole.draws[what], p.draws["kl"]) for p in points]
    return np.mean(gaps, axis=0)


def ablation_row(record: dict[str, Any]) -> str:
    brakes = ", ".join(f"{brake:g}" for brake in record["brakes"])
    cells = [record["title"], brakes, f"{record['kl']:.1f}", *(cell(record[what]) for what in REWARDS)]
    return f"| {' | '.join(cells)} |"


def rates_table(tried: Tried) -> list[str]:
    """What the learning rates were chosen by; nothing where none was tried."""
    if not tried:
        return []
    rates = sorted({rate for own in tried.values() for rate in own})
    lines = [
        "",
        "## Learning rates tried",
        "",
        "Training reward at KL, of the middle brakes on the validation queries.",
    ]
    head = " | ".join(f"{rate:g}" for rate in rates)
    lines += ["", f"| method | {head} |", f"| --- {'| --- ' * len(rates)}|"]
    for name, own in tried.items():
        cells = [", ".join(f"{reward:.2f} at {kl:.1f}" for kl, reward in own.get(rate, ())[1:]) for rate in rates]
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
    return lines


def all_points(curves: Curves) -> list[tuple[Run, Point]]:
    return [item for own in curves.values() for curve in own for item in curve.points.items()]


def raw(run: Run, point: Point) -> dict[str, Any]:
    """A point as it stands in the JSON."""
    brake = {"brake": run.method.brake, "value": run.braked, "learning_rate": run.learning_rate}
    return {"method": run.method.name, **brake, "seed": run.seed, **point.metrics, **point.costs}


def every_point(curves: Curves) -> list[str]:
    """A line a method and brake: means over seeds, the unseen judge seed by seed."""
    head = ["method", "brake", "lr", "KL", *REWARDS.values(), "PPL", "entropy", "distinct-1", "tokens", "cut"]
    lines = ["", "## Every point", "", f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    by_brake: dict[tuple[Method, float], list[tuple[Run, Point]]] = {}
    for run, point in all_points(curves):
        by_brake.setdefault((run.method, run.braked), []).append((run, point))
    for (method, brake), own in by_brake.items():
        means = {name: fmean(point.metrics[name]["mean"] for _, point in own) for name in METRICS}
        judge = listed([point.metrics["judge"]["mean"] for _, point in own])
        named = "" if method.brake == RATE else f"{method.brake} {brake:g}"
        cells = [method.title, named, f"{own[0][0].learning_rate:g}", f"{means['kl']:.1f}"]
        cells += [f"{means['judge']:.2f} ({judge})", f"{means['reward']:.2f}", f"{means['perplexity']:.4g}"]
        cells += [f"{means['entropy']:.2f}", f"{means['distinct_1']:.2f}", f"{means['length']:.0f}"]
        lines.append(f"| {' | '.join(cells)} | {100 * means['truncated']:.0f} % |")
    return lines


def draw(curves: Curves, path: Path) -> None:
    """Both rewards against KL and against perplexity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 9), layout="constrained", sharey="row")
    for row, (what, name) in zip(axes, REWARDS.items(), strict=True):
        for axis, against, most in zip(row, ("kl", "perplexity"), (2 * LEVELS[-1], FLUENT), strict=True):
            for number, method in enumerate(m for m in MAIN if m.name in curves):
                own = [curve.draws for curve in curves[method.name]]
                ends = [(draws[against][0, 0], draws[against][:, 0].max()) for draws in own]
                grid = np.linspace(max(start for start, _ in ends), min(most, *(end for _, end in ends)), 100)
                lines = [along(draws[against][:, :1], draws[what][:, :1], grid) for draws in own]
                style = {"color": f"C{number}", "ls": "-" if number < 10 else "--", "label": method.title}
                axis.plot(grid, np.mean(lines, axis=0), **style)
                axis.fill_between(grid, np.min(lines, axis=0), np.max(lines, axis=0), color=f"C{number}", alpha=0.15)
            axis.set(
                ylabel=name, xlabel="KL, nats a response" if against == "kl" else "perplexity of unseen references"
            )
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    save(figure, path)


def answers(task: Task, curves: Curves) -> list[str]:
    """Answers of every method at about the middle level, first seed, to the same queries, drawn by a seed."""
    level = LEVELS[len(LEVELS) // 2]
    shown_at: dict[str, Point] = {}
    for method in MAIN:
        if method.name in curves:
            points = curves[method.name][0].points.values()
            shown_at[method.title] = min(points, key=lambda point: abs(point.metrics["kl"]["mean"] - level))
    start = next(iter(curves.values()))[0].start
    queries = sample_queries(start.rows["query_id"].to_list())
    lines = [
        f"# {task.title}: answers at equal KL",
        "",
        f"Of each method the point whose KL is nearest to {level:g}, first seed. The {ANSWERS} queries were drawn by a "
        "seed; nothing was selected.",
    ]
    for number, query in enumerate(queries, start=1):
        x = start.rows.filter(query_id=query)["x"].item()
        lines += ["", f"## Query {number}", "", f"> {plain(x)}", "", "| method | KL | judge | answer |"]
        lines += ["| --- | --- | --- | --- |"]
        for title, point in {"start policy": start, **shown_at}.items():
            row = point.rows.filter(query_id=query).row(0, named=True)
            kl = point.metrics["kl"]["mean"]
            lines.append(f"| {title} | {kl:.1f} | {row['reward']:.2f} | {plain(row['y'])} |")
    return lines


def sample_queries(ids: list[str]) -> list[str]:
    """ANSWERS of them, or all."""
    return random.Random(0).sample(sorted(ids), min(ANSWERS, len(ids)))


def plain(text: str) -> str:
    """A text on one line that Markdown leaves as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|~#$])", r"\\\1", " ".join(text.split()))
