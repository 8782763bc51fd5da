"""Evaluations of every method and seed → the paper's tables and Figure 3 of one task: Markdown, JSON and a picture.

A value is over all seeds: a query's responses are those of every seed, and its 95 % interval is a bootstrap over
queries (`ple_data.evaluation.metrics`, as in `ple eval`). Trains, samples and scores nothing.
"""

from __future__ import annotations

import io
import json
import textwrap
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.paper.methods import ALPHA, LEARNING_RATES, METHODS, TAU0, Method, Run
from benchmarks.paper.tasks import Task
from benchmarks.side_by_side import made_with
from ple_data.evaluation.metrics import Mean, Perplexity, SumMetric, bleu
from ple_data.report.round_tables import rounds as round_statistics
from ple_data.rewards import load_reward_model
from ple_data.storage.store import Store
from schemas.files import write_atomic
from schemas.reports import Estimate
from schemas.tables import read_metadata

COLUMNS = {
    "reward": "second judge",
    "trained": "training reward",
    "perplexity": "PPL",
    "bleu": "BLEU",
    "length": "tokens",
}
HEADER = [
    "method",
    "lr",
    *COLUMNS.values(),
    "second judge by seed",
    "PLE (printed) less it",
    "PLE (stabilised) less it",
]
JUDGED = 2000
"""Texts or pairs of reward-test on which the reward models' accuracy is measured."""
PACKAGES = ("torch", "transformers", "peft", "trl", "polars", "sacrebleu")


def write_results(task: Task, results: Path, runs: list[Run], rates_of: Path | None) -> None:
    """TASK.md, TASK.json and pictures in `results`, from the evaluations below the current directory.

    `rates_of`: the file that the learning rates came from; None where this task tried them.
    """
    seeds = sorted({run.seed for run in runs})
    rows = pl.concat([read_evaluation(Path("eval", f"seed={seed}", "eval.parquet"), seed) for seed in seeds])
    label_of = {"base": "base", **{run.method.name: run.label for run in runs}}
    by_method = {name: rows.filter(pl.col("label") == label) for name, label in label_of.items()}
    rates = {run.method.name: run.learning_rate for run in runs}
    first = {run.method.name: run for run in runs if run.seed == seeds[0]}
    records = [
        {
            "method": name,
            "learning_rate": rates.get(name),
            **numbers,
            "tokens_sampled": first[name].costs()["tokens_sampled"] if name in first else None,
            "tokens_trained": first[name].costs()["tokens_trained"] if name in first else None,
            "seconds": first[name].seconds() if name in first else None,
        }
        for name, numbers in compare(by_method, {"ple_less_this": "ple", "stable_ple_less_this": "stable-ple"}).items()
    ]
    all_tried = ", ".join(f"{rate:g}" for rate in LEARNING_RATES)
    chosen = f"{all_tried} tried for every method with seed {seeds[0]} on the validation queries"
    if rates_of:
        chosen = f"those that {rates_of.stem} chose for every method, none tried here"
    lines = [
        f"# {task.title}: one point a method ({task.tables} of the paper, small)",
        "",
        f"- Seeds: {', '.join(map(str, seeds))}",
        f"- Rounds: {task.rounds} rounds of {task.queries_per_round} queries",
        f"- Thresholds: tau_0 = {TAU0}, alpha = {ALPHA}",
        f"- Learning rates: {chosen}",
        f"- Made with: {made_with(*PACKAGES)}; {datetime.now(UTC):%d %B %Y}",
        f"- BLEU: `{signature(Path('eval', f'seed={seeds[0]}', 'eval.json'))}`",
        "",
        f"| {' | '.join(HEADER)} |",
        f"| {' | '.join('---' for _ in HEADER)} |",
        *map(table_row, records),
        "",
        "Intervals are over queries, for these seeds. The differences seed by seed stand in round brackets; they also "
        "hold what training's randomness does. Training saw the training reward alone.",
        "",
        *accuracies(task),
        "",
        "## What each method cost (first seed)",
        "",
        "| method | response tokens sampled | response tokens trained on, every pass counted | minutes |",
        "| --- | --- | --- | --- |",
        *map(cost_row, records[1:]),
        "",
        "Minutes are wall time of one thread on a machine that did other work too. They say which method is dear, no "
        "more.",
        "",
        *figure_3(results / f"{task.name}-figure3.png", runs),
        "",
        *drift_table(task, [run for run in runs if run.seed == seeds[0]]),
    ]
    if not rates_of:
        report = Path("eval", "validation", "eval.json")
        lines += ["", *tries(report, rates)]
    results.mkdir(parents=True, exist_ok=True)
    write_atomic(results / f"{task.name}.md", "\n".join(line for long in lines for line in wrapped(long)) + "\n")
    record = {"version": 4, "seeds": seeds, "methods": records}
    write_atomic(results / f"{task.name}.json", json.dumps(record, indent=1) + "\n")


def compare(by_method: dict[str, pl.DataFrame], less: dict[str, str]) -> dict[str, dict[str, Any]]:
    """By method, each column's estimate over all seeds, and the second judge's mean reward seed by seed.

    `less`: for each of these names the method from whose reward this one's is taken away, query by query.
    """
    found = {name: metrics(rows) for name, rows in by_method.items()}
    by_seed = {
        name: rows.group_by("seed").agg(pl.col("reward").mean()).sort("seed")["reward"].to_list()
        for name, rows in by_method.items()
    }
    return {
        name: {
            **{column: own[column].estimate(0).model_dump() for column in COLUMNS},
            "second_judge_by_seed": by_seed[name],
            **{
                key: found[other]["reward"].less(own["reward"], 0).model_dump()
                | {"by_seed": (np.array(by_seed[other]) - np.array(by_seed[name])).tolist()}
                for key, other in less.items()
            },
        }
        for name, own in found.items()
    }


TITLES = {"base": "base", **{method.name: method.title for method in METHODS}}


def accuracies(task: Task) -> list[str]:
    """How often each reward model prefers the better of two held-out texts (0.5 is chance)."""
    rows = pl.read_parquet("reward-test.parquet").sample(fraction=1.0, shuffle=True, seed=0)[:JUDGED]
    lines = ["| reward model | prefers the better of two held-out texts |", "| --- | --- |"]
    for name, spec in (("training reward", task.reward), ("second judge", task.second_judge)):
        score = load_reward_model(spec).score
        if "label" in rows.columns:
            rewards = np.array(score([("", text) for text in rows["text"]]))
            good, bad = (rewards[rows["label"].to_numpy() == label] for label in (1, 0))
            wins = np.sign(good[:, None] - bad[None, :])
            which = f"{good.size} positive against {bad.size} negative, all pairs"
        else:
            chosen, rejected = (np.array(score(rows.select("prompt", c).rows())) for c in ("chosen", "rejected"))
            wins, which = np.sign(chosen - rejected), f"{len(rows)} pairs"
        lines.append(f"| {name} | {wins.mean() / 2 + 0.5:.3f} ({which}) |")
    return lines


def cost_row(record: dict[str, Any]) -> str:
    """One method's line of the table of costs."""
    tokens = f"{record['tokens_sampled']:,} | {record['tokens_trained']:,}"
    return f"| {TITLES[record['method']]} | {tokens} | {record['seconds'] / 60:.1f} |"


def table_row(record: dict[str, Any]) -> str:
    """One method's line of the table."""
    rate = f"{record['learning_rate']:g}" if record["learning_rate"] else ""
    cells = [shown(Estimate(**record[column]), column) for column in COLUMNS]
    cells += [listed(record["second_judge_by_seed"])]
    cells += [difference(record[f"{ple}_less_this"]) for ple in ("ple", "stable_ple")]
    return f"| {TITLES[record['method']]} | {rate} | {' | '.join(cells)} |"


def listed(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def difference(record: dict[str, Any]) -> str:
    """A paired difference over all seeds, and each seed's own where there are several."""
    by_seed = record["by_seed"]
    whole = str(Estimate(**{key: value for key, value in record.items() if key != "by_seed"}))
    return f"{whole} ({listed(by_seed)})" if len(by_seed) > 1 else whole


def wrapped(line: str) -> list[str]:
    """The lines of at most 120 characters that a line of prose becomes; tables, headings and pictures stay."""
    if line.startswith(("|", "#", "!")):
        return [line]
    indent = "  " if line.startswith("- ") else ""
    return textwrap.wrap(line, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [line]


def signature(report: Path) -> str:
    """sacrebleu's, as `ple eval` wrote it."""
    return str(json.loads(report.read_text())["bleu_signature"])


def read_evaluation(path: Path, seed: int) -> pl.DataFrame:
    """The rows of one seed with the columns `trained` and `reward`: under the training and the second reward model."""
    models = read_metadata(path, "evaluation")["reward_models"]
    at = {("trained" if model["trained"] else "reward"): place for place, model in enumerate(models)}
    rewards = [pl.col("rewards").list.get(place).alias(name) for name, place in at.items()]
    return pl.read_parquet(path).with_columns(*rewards, seed=pl.lit(seed))


def metrics(rows: pl.DataFrame) -> dict[str, SumMetric]:
    """Each column of the table over all seeds, query by query."""
    queries = rows.group_by("query_id").agg(pl.all()).sort("query_id")
    count = queries["y"].list.len()

    def mean(column: str) -> Mean:
        return Mean(np.stack([queries[column].list.sum().to_numpy(), count.to_numpy()], axis=1).astype(np.float64))

    likelihood = np.stack(
        [queries["reference_nll"].list.sum().to_numpy(), queries["reference_tokens"].list.sum().to_numpy()], axis=1
    )
    overlap, _ = bleu(queries["y"].to_list(), queries["reference"].list.first().to_list())
    return {
        "reward": mean("reward"),
        "trained": mean("trained"),
        "perplexity": Perplexity(likelihood.astype(np.float64)),
        "bleu": overlap,
        "length": mean("tokens"),
    }


def shown(value: Estimate, column: str) -> str:
    if column == "perplexity":
        return f"{value.mean:.1f} [{value.low:.1f}, {value.high:.1f}]" if value.mean < 1e5 else f"{value.mean:.1e}"
    return f"{value.mean:.0f}" if column == "length" else str(value)


def drift_table(task: Task, runs: list[Run]) -> list[str]:
    """How far PLE and its ablations had pushed responses down, by round."""
    lines = [
        "## How far responses were pushed down",
        "",
        "The numbers are the mean log-probability of the responses with a negative coefficient, less what the start "
        "policy gives them. They are in nats a token, over the second half of each round, of the first seed. Without "
        "a trust region every tenth step is measured.",
        "",
        f"| method | {' | '.join(f'round {t}' for t in range(task.rounds))} |",
        f"| {' | '.join('---' for _ in range(task.rounds + 1))} |",
    ]
    for run in runs:
        paths = [run.directory / "metrics" / f"round={t:03d}.parquet" for t in range(task.rounds)]
        if run.method.baseline is None and all(path.exists() for path in paths):
            drifts = [pl.read_parquet(path)["drift_pushed_down"] for path in paths]
            means = [drift[len(drift) // 2 :].mean() for drift in drifts]
            cells = ["" if mean is None else f"{mean:.2f}" for mean in means]
            lines.append(f"| {TITLES[run.method.name]} | {' | '.join(cells)} |")
    return lines


def tried(report: Path) -> dict[Method, dict[float, tuple[float, float]]]:
    """By method and learning rate that did not diverge: training reward and perplexity on the validation queries."""
    found = {policy["label"]: policy["metrics"] for policy in json.loads(report.read_text())["policies"]}

    def values(metrics: dict[str, Any]) -> tuple[float, float]:
        reward = next(value["mean"] for name, value in metrics.items() if name.startswith("reward:"))
        return reward, metrics["perplexity"]["mean"]

    labels = {method: {rate: Run(method, rate, 0, method.usual).label for rate in LEARNING_RATES} for method in METHODS}
    return {
        method: {rate: values(found[label]) for rate, label in own.items() if label in found}
        for method, own in labels.items()
    }


def tries(report: Path, chosen: dict[str, float]) -> list[str]:
    """Every learning rate that was tried, on the validation queries: training reward and perplexity."""
    lines = [
        "## Learning rates tried",
        "",
        "The cells are training reward / perplexity on the validation queries, first seed. The highest reward was "
        "chosen (bold).",
        "",
        f"| method | {' | '.join(f'{rate:g}' for rate in LEARNING_RATES)} |",
        f"| {' | '.join('---' for _ in range(len(LEARNING_RATES) + 1))} |",
    ]
    for method, own in tried(report).items():
        cells = [f"{own[rate][0]:.2f} / {own[rate][1]:.3g}" if rate in own else "diverged" for rate in LEARNING_RATES]
        best = LEARNING_RATES.index(chosen[method.name])
        cells[best] = f"**{cells[best]}**"
        lines.append(f"| {method.title} | {' | '.join(cells)} |")
    return lines


def figure_3(path: Path, runs: list[Run]) -> list[str]:
    """Mean s and s_prompt by round of both PLE runs, first seed: a picture, and the same as a table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = min(run.seed for run in runs)
    lines = ["## Figure 3: rewards by round", "", f"![s and s_prompt by round, with 95 % intervals]({path.name})"]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for run, axis in zip(
        [r for r in runs if r.seed == first and r.method.name in ("ple", "stable-ple")], axes, strict=True
    ):
        rounds = round_statistics(Store(run.directory / "data").scan("pairs"), TAU0, ALPHA)
        t = [row["round"] for row in rounds]
        for name, mark in (("s_prompt", "o-"), ("s", "s-")):
            means, halves = ([row[f"{what}_{name}"] for row in rounds] for what in ("mean", "half"))
            axis.errorbar(t, means, yerr=halves, fmt=mark, capsize=3, label=name)
        axis.set(title=run.method.title, xlabel="round", xticks=t)
        axis.grid(alpha=0.3)
        lines += ["", f"{run.method.title}, seed {first}:", "", "| round | s | s_prompt | gap | tau_t | rank share |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        lines += [
            f"| {row['round']} | {row['mean_s']:.2f} | {row['mean_s_prompt']:.2f} | {row['mean_margin']:.2f} "
            f"| {row['tau']:.3f} | {100 * row['rank_share']:.0f} % |"
            for row in rounds
        ]
    axes[0].set_ylabel("mean training reward")
    axes[0].legend()
    save(figure, path)
    return lines


def save(figure: Any, path: Path) -> None:
    """The figure as PNG, whole or not at all."""
    from matplotlib import pyplot

    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    pyplot.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, image.getvalue())
