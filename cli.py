"""The command line: which options each command has, and which function it runs.

`--help` is instant: only click is imported, and a function when its command starts. The help texts are in
`schemas/options/help.toml`, the options in `schemas.options`, errors and exit codes in `ple_data.common.command`.
"""

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ple_data.common.click_options import refuse_given
from ple_data.common.command import command, debug, group, say, version
from schemas import options

if TYPE_CHECKING:
    from ple_data.rewards import RewardModel


def _gen(chosen: options.Gen) -> str | None:
    from ple_data.rewards import check_reward_model, kind_of, options_of, rubric_of
    from ple_data.sampling.generate import generate

    chosen = chosen.but(rubric=rubric_of(chosen.reward_model, chosen.rubric, chosen.principles))
    if chosen.reward_model:
        for spec, how in zip(chosen.reward_model, options_of(chosen.reward_model, chosen), strict=True):
            check_reward_model(spec, how)
    summary = generate(chosen)
    if summary.dry_run is None and chosen.reward_model:
        parts = (chosen.part(kind).values() for kind in (options.Rewards, options.Spread, options.Scored))
        score = {name: value for part in parts for name, value in part.items()}
        if "judge" in map(kind_of, chosen.reward_model):  # it is asked from one process
            score["workers"] = None
        _score(options.Score(data=chosen.data, round=chosen.round, **score))
    return summary.dry_run


def _score(chosen: options.Score) -> None:
    from ple_data.rewards import check_reward_model, kind_of, options_of
    from ple_data.scoring.combine import score_together
    from ple_data.scoring.score import score
    from ple_data.storage.store import Store
    from schemas.errors import UsageError

    if chosen.workers and "judge" in map(kind_of, chosen.reward_model):
        raise UsageError("--workers: a judge is asked from one process; --reward-concurrency says how much at once")
    store, output = Store(chosen.data), Store(chosen.output) if chosen.output else None
    keep = (output or store).inside(".ple", "ratings")
    models = list(zip(chosen.reward_model, options_of(chosen.reward_model, chosen), strict=True))
    loads = [partial(_reward_model, how, spec, keep) for spec, how in models]
    together = chosen.combination()
    if together is None:
        with loads[0]() as reward_model:
            score(store, reward_model, round=chosen.round, output=output)
        return
    for spec, how in models:
        check_reward_model(spec, how)
    score_together(store, loads, together, round=chosen.round, output=output)


@contextlib.contextmanager
def _reward_model(chosen: options.Score, spec: str, keep: Path) -> Iterator["RewardModel"]:
    """The reward model, or many workers with one each; gone at the end. keep: where a judge's answers are kept."""
    from ple_data.rewards import load_reward_model

    if not chosen.workers:
        yield load_reward_model(spec, chosen, keep)
        return
    from ple_data.common.workers import Wanted
    from ple_data.scoring.workers import WorkersReward

    wanted, how = Wanted(chosen.workers, chosen.ray), chosen.part(options.Rewards)
    with contextlib.closing(WorkersReward(spec, how, wanted, say)) as workers:
        yield workers


def _train(chosen: options.Train) -> None:
    from ple_train import train

    if chosen.dry_run:
        print(train.dry_run(chosen))
    else:
        train.train(chosen)


def _baseline(chosen: options.Baseline, *, method: str) -> None:
    from ple_train.baselines.responses import baseline

    baseline(method, chosen)


def _run(chosen: options.Run) -> None:
    from ple_train.run import rounds
    from schemas.recipe import load_recipe

    recipe = load_recipe(chosen.recipe, list(chosen.overrides))
    if chosen.dry_run:
        for stage in rounds.plan(recipe):
            print(stage.shell_line)
    else:
        rounds.run(recipe)


def _verify(chosen: options.Verify) -> None:
    from ple_data.common.terminal import LONGEST_LINE, cut
    from ple_data.storage.verify import check, held

    for problem in check(chosen.data):
        print(cut(str(problem), LONGEST_LINE))
    say(f"{chosen.data}: whole: {held(chosen.data)}")


def _evaluate(chosen: options.Evaluate) -> str:
    from ple_data.evaluation.table import format_report
    from ple_train.measure.evaluate import evaluate

    if chosen.data:
        refuse_given(["Queries", "Sampling", "Engine"], "with --data, which takes responses as they are")
    report = evaluate(chosen)
    return json.dumps(report.model_dump(mode="json"), indent=1) if chosen.as_json else format_report(report)


def _report(chosen: options.Report) -> str:
    if chosen.watch:
        from ple_data.report.watch import watch

        return watch(chosen)
    from ple_data.report.page import report

    if chosen.port is not None:
        raise click.UsageError("--port: it is for --watch; give both, or leave it out")
    return report(**{name: value for name, value in chosen.values().items() if name not in ("watch", "port")})


def _point_to_policy(_: click.Context, option: click.Parameter, given: str | None) -> None:
    if given is not None:
        raise click.UsageError(
            f"{option.opts[0]}: policies have names here: give --policy NAME=MODEL or --policy NAME=MODEL,ADAPTER for "
            "each, e.g. --policy base=M --policy tuned=M,A"
        )


_ELSEWHERE = [
    click.Option([name], hidden=True, expose_value=False, callback=_point_to_policy)
    for name in ("--model", "--adapter")
]
"""Options of other commands in whose place `ple eval` and `ple cases` have --policy."""

gen = command("ple-gen", options.Gen, _gen)
score = command("ple-score", options.Score, _score)
train = command("ple-train", options.Train, _train)
baseline = group(
    "baseline",
    {
        "sft": command("baseline sft", options.BaselineSft, partial(_baseline, method="sft")),
        "context-distillation": command(
            "baseline context-distillation",
            options.ContextDistillation,
            partial(_baseline, method="context-distillation"),
        ),
        "raft": command("baseline raft", options.Baseline, partial(_baseline, method="raft")),
        "dpo": command("baseline dpo", options.Dpo, "ple_train.baselines.dpo:dpo"),
        "ppo": command("baseline ppo", options.Ppo, "ple_train.baselines.ppo:ppo"),
    },
)
COMMANDS = {
    "demo": command("demo", options.Demo, "ple_train.demo.demo:demo"),
    "run": command("run", options.Run, _run),
    "gen": gen,
    "score": score,
    "train": train,
    "sft": command("sft", options.Sft, "ple_train.sft:sft"),
    "reward": command("reward", options.Reward, "ple_train.reward:reward"),
    "eval": command("eval", options.Evaluate, _evaluate, _ELSEWHERE),
    "cases": command("cases", options.Cases, "ple_data.evaluation.cases:cases", _ELSEWHERE),
    "baseline": baseline,
    "judge": command("judge", options.Judge, "ple_data.judge.judge:run"),
    "inspect": command("inspect", options.Inspect, "ple_data.inspection:inspect", by_name=True),
    "export": command("export", options.Export, "ple_data.exchange.export:export", by_name=True),
    "import": command("import", options.Import, "ple_data.exchange.importing:import_pairs"),
    "push": command("push", options.Push, "ple_data.exchange.push:push"),
    "convert": command("convert", options.Convert, "ple_train.model.convert:convert"),
    "verify": command("verify", options.Verify, _verify),
    "purity": command("purity", options.Purity, "ple_train.measure.purity:purity"),
    "report": command("report", options.Report, _report),
}
ple = debug(version(group("ple", COMMANDS)))


if __name__ == "__main__":
    ple(prog_name="ple")
