"""`ple demo`: the whole job through the same child processes as a real run, on a toy world or on a real model.

A demo prepares its folder, runs its recipe (rounds of ple-gen, ple-score and ple-train), measures every policy with
`ple eval`, and shows the result. Everything shown is measured here. Every step is skipped when it is done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ple_data.common.extras import need
from ple_data.common.terminal import text_table
from ple_train.demo import real, toy
from ple_train.demo.world import World, ple
from schemas.errors import UsageError
from schemas.files import write_atomic
from schemas.options import Demo
from schemas.recipe import load_recipe
from schemas.reports import Estimate, EvalReport

START = "start"


def demo(options: Demo) -> str:
    """Runs what is left of the demo in its folder and gives its closing report."""
    from ple_data.partition import round_statistics
    from ple_data.storage.store import Store

    kind = real if options.real else toy
    output = options.output or Path("demo-real" if options.real else "demo")
    world = kind.world(output, options.rounds or kind.ROUNDS)
    changes = [f"rounds={options.rounds}"] if options.rounds else []
    recipe = load_recipe(world.recipe, changes)  # that of an earlier start may have been changed by its user
    ple("run", world.recipe, *(word for change in changes for word in ("--set", change)))
    report = _measured(output, world, recipe.rounds)
    by_round = round_statistics(Store(output / "run" / "data").scan("pairs"), recipe.tau0, recipe.alpha).to_dicts()
    return _report(output, world, by_round, report)


def _measured(output: Path, world: World, rounds: int) -> EvalReport:
    """The policies before and after each round, by `ple eval`; what is measured already stays."""
    adapters = [output / "run" / "policy" / f"round={t:03d}" for t in range(rounds)]
    policies = [f"{START}={world.start}", *(f"round-{t}={world.start},{path}" for t, path in enumerate(adapters))]
    words = [word for policy in policies for word in ("--policy", policy)]
    ple("eval", *words, *world.measured, "--output", output / "measures")
    return EvalReport.model_validate_json((output / "measures" / "eval.json").read_bytes())


def _report(output: Path, world: World, by_round: list[dict[str, Any]], report: EvalReport) -> str:
    pairs = text_table(
        ["round", "tau", "s", "s_prompt", "gap", "rank set"],
        [
            [
                str(row["round"]),
                f"{row['tau']:.3f}",
                *(f"{row[name]:.2f}" for name in ("mean_s", "mean_s_prompt", "mean_margin")),
                f"{100 * row['rank_share']:.0f} %",
            ]
            for row in by_round
        ],
        left=0,
    )
    metrics = {f"reward:{at}": f"reward:{use.name}" for at, use in enumerate(report.reward_models)}
    names = [metrics.get(name, name) for name in world.columns]
    cells = [
        [policy.label, *(str(policy.metrics[name]) if name in policy.metrics else "" for name in names)]
        for policy in report.policies
    ]
    unseen = text_table(["policy", *world.columns.values()], cells, left=1)
    last, trained = report.policies[-1], metrics["reward:0"]
    rewards = [policy.metrics[trained] for policy in report.policies]
    gains = report.differences()[START][last.label]
    told = {
        "pairs": "\n".join(pairs),
        "unseen": "\n".join(unseen),
        "before": rewards[0],
        "after": rewards[-1],
        "gains": "\n".join(
            f"{heading}: {gains[name].mean:+.2f} [{gains[name].low:+.2f}, {gains[name].high:+.2f}]"
            for name, heading in zip(names, world.columns.values(), strict=True)
            if name in gains
        ),
        "curve": _draw(output / "learning-curve.png", world.title, by_round, rewards),
        "output": output,
        **world.told(),
    }
    closing = world.report.format(**told).rstrip("\n")
    write_atomic(output / "report.txt", closing + "\n")
    return closing


def _draw(path: Path, title: str, by_round: list[dict[str, Any]], rewards: list[Estimate]) -> str:
    """The learning curve: s and s_prompt of the pairs by round, and the reward on unseen queries after it.

    Gives back where it is, or what to install to have one: the demo itself runs without matplotlib.
    """
    try:
        need("matplotlib", "it is drawn with")
    except UsageError as error:
        return str(error)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    rounds = [row["round"] for row in by_round]
    axes.plot(
        rounds, [row["mean_s_prompt"] for row in by_round], "o-", color="#1b7837", label="s_prompt, with the principle"
    )
    axes.plot(rounds, [row["mean_s"] for row in by_round], "o-", color="#762a83", label="s, without")
    places = [t - 0.08 for t in range(len(rewards))]
    errors = [[r.mean - r.low for r in rewards], [r.high - r.mean for r in rewards]]
    label = f"unseen queries, without (95 % interval of {rewards[0].count})"
    axes.errorbar(places, [r.mean for r in rewards], yerr=errors, fmt="s", color="#888888", capsize=3, label=label)
    axes.set_xticks(range(len(rewards)))
    axes.set_xlabel("rounds of training before")
    axes.set_ylabel("mean reward")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return str(path)
