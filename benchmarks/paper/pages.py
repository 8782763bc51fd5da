"""The pages of a task's frontier: raw JSON, curves with bands, tables at equal KL, ablations, answers as they came.

The numbers are of the record beside the pages; the math is in `frontier`. Trains and samples nothing.
"""

from __future__ import annotations

import json
import random
import re
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.paper.comparisons import (
    FORMS,
    LEVELS,
    REWARDS,
    Curves,
    ablations,
    areas,
    at_equal_kl,
    at_own_kl,
)
from benchmarks.paper.frontier import along
from benchmarks.paper.methods import FRONTIER, MAIN, RATE, Method, Run
from benchmarks.paper.points import METRICS, Point, Record, read_curves
from benchmarks.paper.tables import listed, save, wrapped
from benchmarks.paper.tasks import Task
from schemas.files import write_atomic
from schemas.reports import Estimate

ANSWERS = 10
FLUENT = 250.0
"""Perplexity at which the picture ends; that of KL ends at twice the last level."""
TICKS = (0.0, 1.0, 2.0, 5.0, *LEVELS, 30.0, 2 * LEVELS[-1])
NEAR = 4.0
"""Nats: an answer's policy that lies further than that from the level has a star."""
FAR = 2.0
"""A number at a KL has a dagger where it lies on a line to a point beyond this many times that KL."""
Tried = dict[str, dict[float, list[tuple[float, float]]]]
"""By method and learning rate: KL and training reward on the validation queries, the start policy's first."""
TITLES = {method.name: method.title for method in FRONTIER}


def write_pages(
    task: Task, results: Path, runs: list[Run], rates: dict[str, float], tried: Tried, kept: Record
) -> None:
    """TASK-frontier.md, .json and .png and TASK-answers.md in `results`, of those runs that are in the record."""
    curves = read_curves(runs, kept)
    seeds = sorted({curve.seed for own in curves.values() for curve in own})
    name = f"{task.name}-frontier"
    levels = {level: at_equal_kl(curves, level) for level in LEVELS}
    heights = areas(curves, LEVELS[-1])
    forms = [name for name in FORMS if name in curves]
    others = [method.name for method in MAIN if method.name in curves and method.name not in FORMS]
    own_kl = {f: {o: found for o in others if (found := at_own_kl(curves, o, f))} for f in forms}
    parts = ablations(curves)
    diverged = {seed: labels for seed in seeds if (labels := kept.diverged(seed))}
    lines = [
        f"# {task.title}: rewards against the distance from the start policy",
        "",
        f"- Made by: `python -m benchmarks.paper {task.name} --frontier --seeds {','.join(map(str, seeds))} "
        f"{' '.join(f'--{name} {name.upper()}' for name in task.inputs)} --output runs/paper/{task.name}`",
        f"- Rounds: {task.rounds} rounds of {task.queries_per_round} queries; KL in nats a response, on own responses",
        *(f"- Seeds {', '.join(map(str, own))} with: {made}" for made, own in kept.made_with(seeds).items()),
        *still_open(runs, curves, diverged),
        f"- Raw numbers: [{name}.json]({name}.json), query by query in {name}/; {datetime.now(UTC):%d %B %Y}",
        f"- Texts: [{task.name}-answers.md]({task.name}-answers.md)",
        "",
        f"![rewards against KL and against perplexity]({name}.png)",
        "",
        "Lines are means over seeds, bands the lowest and highest seed. A seed's curve joins the start policy and the "
        "method's points by lines that are straight over the root of KL, along which rewards rise about evenly; the "
        "shortest one ends the line. Higher and further left is better.",
        *(line for level, found in levels.items() for line in table(f"At a KL of {level:g}", found, curves, level)),
        "",
        "Intervals are 95 % over queries (bootstrap) and seeds (Student's t), added in quadrature. Single seeds stand "
        "in round brackets. A method has a number where it has points on both sides in every seed; *between* says how "
        f"near they are. With a dagger (†) the further one lies beyond {FAR:g} times the KL in some seed: "
        f"the number, and every difference to it, is that of a long line. {how_rates(task, tried)}",
        *table(f"Mean reward along the curve, up to a KL of {LEVELS[-1]:g}", heights, curves),
        "",
        "The mean is over the root of KL. Below a method's first point the line from the start policy counts.",
        "",
        "## PLE's forms less each other method",
        "",
        "At one KL, and at the other's own KL: the curve of PLE's form less the other's points, mean over its brakes. "
        "With a star, some of these lie before the form's own first point, where its curve is the line from the start "
        "policy. Points beyond the form's curve do not count; of one seed, the interval is over queries alone.",
        *(line for form in forms for line in form_tables(form, others, levels, own_kl[form])),
        *ablations_table(parts),
        *rates_table(tried),
        *every_point(curves),
        *(f"- Seed {seed}: {', '.join(labels)} diverged." for seed, labels in diverged.items()),
    ]
    record = {
        "version": 1,
        "seeds": seeds,
        "levels": LEVELS,
        "rates": rates,
        "tried": tried,
        "start": {str(curve.seed): curve.start.metrics for curve in next(iter(curves.values()))},
        "equal_kl": levels,
        "at_own_kl": own_kl,
        "area": heights,
        "ablations": parts,
        "points": [raw(run, point) for run, point in all_points(curves)],
        "diverged": diverged,
    }
    results.mkdir(parents=True, exist_ok=True)
    draw(curves, results / f"{name}.png")
    write_atomic(results / f"{name}.json", json.dumps(record, indent=1) + "\n")
    for page, found in ((name, lines), (f"{task.name}-answers", answers(task, curves))):
        write_atomic(results / f"{page}.md", "\n".join(line for long in found for line in wrapped(long)) + "\n")


def cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    whole = str(Estimate(**{name: value for name, value in record.items() if name != "by_seed"}))
    return f"{whole} ({listed(record['by_seed'])})"


def table(title: str, found: dict[str, Any], curves: Curves, level: float | None = None) -> list[str]:
    """One line a method: both rewards, and of those at one KL, `level`, the KL of the points between which they lie."""
    head = ["method", *([] if level is None else ["between"]), *REWARDS.values()]
    lines = ["", f"## {title}", "", f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    for method in MAIN:
        if own := found.get(method.name):
            ends = [] if level is None else [ends_of(own["between"], level)]
            lines.append(f"| {' | '.join([method.title, *ends, *(cell(own[what]) for what in REWARDS)])} |")
        elif method.name in curves:
            kls = [[point.draws["kl"][0] for point in curve.points.values()] for curve in curves[method.name]]
            span = f"has {min(map(min, kls)):.1f} to {max(map(max, kls)):.1f}"
            lines.append(f"| {method.title} | {span} {'| ' * (len(head) - 2)}|")
    return lines


def ends_of(between: tuple[float, float], level: float) -> str:
    return " and ".join(f"{kl:.1f}" for kl in between) + (" †" if between[1] > FAR * level else "")


def form_tables(
    form: str, others: list[str], levels: dict[float, dict[str, Any]], own: dict[str, dict[str, Any]]
) -> list[str]:
    """A form of PLE less each other method: a table a reward, a column a level, and at the other's own KL."""
    lines = []
    for what, title in REWARDS.items():
        head = ["less", *(f"at {level:g}" for level in levels), "at its own KL"]
        lines += ["", f"### {TITLES[form]}, {title}", "", f"| {' | '.join(head)} |"]
        lines.append(f"| {' | '.join('---' for _ in head)} |")
        for other in others:
            less = [at.get(form, {}).get(f"{what}_less", {}).get(other) for at in levels.values()]
            found = own.get(other)
            cells = [*map(cell, less), cell(negative(found, what)) + (marks(found) if found else "")]
            lines.append(f"| {TITLES[other]} | {' | '.join(cells)} |")
    return lines


def marks(record: dict[str, Any]) -> str:
    """Of `at_own_kl`: which seeds it is of where the others have no point within the curve, and a star."""
    only = f" (of seed {' and '.join(map(str, record['only_seeds']))} only)" if record["only_seeds"] else ""
    return only + (" *" if record["from_start"] else "")


def negative(record: dict[str, Any] | None, what: str) -> dict[str, Any] | None:
    """Of `at_own_kl`, the other less the one."""
    if record is None:
        return None
    own = record[what]
    turned = {"mean": -own["mean"], "low": -own["high"], "high": -own["low"]}
    return own | turned | {"by_seed": [-value for value in own["by_seed"]]}


def ablations_table(parts: list[dict[str, Any]]) -> list[str]:
    """Nothing where there are none."""
    if not parts:
        return []
    return [
        "",
        "## Ablations",
        "",
        "Each less the whole method at the same KL, which is interpolated; mean over the ablation's brakes. An "
        "ablation has the learning rate of the whole. DPO by length, the last row, has its own. With a star, some lie "
        "before the whole's own first point, where its curve is the line from the start policy. Points beyond the "
        "whole's curve do not count; of one seed, the interval is over queries alone.",
        "",
        "| ablation | brakes | KL | unseen judge, less the whole | training reward, less the whole |",
        "| --- | --- | --- | --- | --- |",
        *map(ablation_row, parts),
    ]


def ablation_row(record: dict[str, Any]) -> str:
    if "kl" not in record:
        return f"| {record['title']} | | beyond the whole's curve | | |"
    brakes = ", ".join(f"{brake:g}" for brake in record["brakes"])
    kl = f"{record['kl']:.1f}{marks(record)}"
    cells = [record["title"], brakes, kl, *(cell(record[what]) for what in REWARDS)]
    return f"| {' | '.join(cells)} |"


def still_open(runs: list[Run], curves: Curves, diverged: dict[int, list[str]]) -> list[str]:
    made = len(all_points(curves)) + sum(map(len, diverged.values()))
    return [f"- **Not whole yet**: {made} of {len(runs)} points are made"] if made < len(runs) else []


def how_rates(task: Task, tried: Tried) -> str:
    if task.rate is not None:
        return f"No learning rate was tried: a method whose brake is another option has {task.rate:g}."
    if not tried:
        return "Learning rates were given (`--rates`); they are in the raw numbers."
    return "Learning rates were chosen with the first seed, on other queries than these."


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
    """A line a method and brake: means over seeds, the unseen judge seed by seed, and what the trainings took."""
    head = ["method", "brake", "lr", "KL", *REWARDS.values(), "PPL", "entropy", "distinct-1", "tokens", "cut"]
    head += ["updates", "trained on"]
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
        updates, tokens = (fmean(point.costs[name] for _, point in own) for name in ("updates", "tokens_trained"))
        cells += [f"{100 * means['truncated']:.0f} %", f"{updates:.0f}", f"{tokens / 1000:.0f}k tokens"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(curves: Curves, path: Path) -> None:
    """Both rewards against KL, on an axis of its root, and against perplexity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 9), layout="constrained", sharey="row")
    for row, (what, name) in zip(axes, REWARDS.items(), strict=True):
        ends_at = (("distance", (2 * LEVELS[-1]) ** 0.5), ("perplexity", FLUENT))
        for axis, (against, most) in zip(row, ends_at, strict=True):
            for number, method in enumerate(m for m in MAIN if m.name in curves):
                own = [curve.draws for curve in curves[method.name]]
                ends = [(draws[against][:, 0].min(), draws[against][:, 0].max()) for draws in own]
                grid = np.linspace(max(start for start, _ in ends), min(most, *(end for _, end in ends)), 100)
                lines = [along(draws[against][:, :1], draws[what][:, :1], grid) for draws in own]
                style = {"color": f"C{number}", "ls": "-" if number < 10 else "--", "label": method.title}
                axis.plot(grid, np.mean(lines, axis=0), **style)
                axis.fill_between(grid, np.min(lines, axis=0), np.max(lines, axis=0), color=f"C{number}", alpha=0.15)
            axis.set(ylabel=name, xlabel="perplexity of unseen references")
            if against == "distance":
                axis.set(xlabel="KL, nats a response (axis of its root)")
                axis.set_xticks([kl**0.5 for kl in TICKS], [f"{kl:g}" for kl in TICKS])
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
        f"# {task.title}: answers near a KL of {level:g}",
        "",
        f"Of each method the point whose KL is nearest to {level:g}, first seed; with a star, that is further than "
        f"{NEAR:g} from it. The {ANSWERS} queries were drawn by a seed; nothing was selected.",
    ]
    for number, query in enumerate(queries, start=1):
        x = start.rows.filter(query_id=query)["x"].item()
        lines += ["", f"## Query {number}", "", f"> {plain(x)}", "", "| method | KL | judge | answer |"]
        lines += ["| --- | --- | --- | --- |"]
        for title, point in {"start policy": start, **shown_at}.items():
            row = point.rows.filter(query_id=query).row(0, named=True)
            kl = point.metrics["kl"]["mean"]
            star = " *" if point is not start and abs(kl - level) > NEAR else ""
            lines.append(f"| {title} | {kl:.1f}{star} | {row['judge']:.2f} | {plain(row['y'])} |")
    return lines


def sample_queries(ids: list[str], count: int = ANSWERS) -> list[str]:
    """`count` of them, or all."""
    return random.Random(0).sample(sorted(ids), min(count, len(ids)))


def plain(text: str) -> str:
    """A text on one line that Markdown leaves as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|~#$])", r"\\\1", " ".join(text.split()))
