"""The paper's tables (benchmarks/paper): every run is a command that `ple` takes; the numbers. Trains nothing."""

import json
import math
from pathlib import Path

import polars as pl
import pytest

import cli
from benchmarks.paper.__main__ import DIVERGED, best_rates, read_rates
from benchmarks.paper.methods import METHODS, PLE, ROUNDS, Run
from benchmarks.paper.tables import compare, read_evaluation
from benchmarks.paper.tasks import TASKS
from ple_data.storage.parquet import save_rows
from ple_train.engine.loop import _not_finite
from schemas.recipe import load_recipe


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_every_run_is_a_command_of_ours(task, method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sampled = Run(PLE, 1e-3, 0).adapter.parent
    for t in range(ROUNDS):
        (sampled / f"round={t:03d}").mkdir(parents=True)
        (sampled / f"round={t:03d}" / "ple.json").write_text(json.dumps({"cost": {"tokens_sampled": 100}}))
    (Run(PLE, 3e-4, 0).adapter.parent / "round=000" / ".ple").mkdir(parents=True)  # that one diverged
    words = Run(method, 3e-3, 0).command(task)  # another rate than that of the run that sampled
    if words[0] == "run":
        recipe = load_recipe(Path(words[1]))
        assert (recipe.rounds, recipe.seed) == (ROUNDS, 0)
        assert recipe.queries_per_round * method.responses == 2 * task.queries_per_round
    else:
        assert words[0] == "baseline"
        command = cli.ple.commands["baseline"].commands[words[1]]
        (tmp_path / "queries.parquet").touch()
        options = command.make_context(words[1], list(words[2:])).params
        assert options["learning_rate"] == 3e-3
        assert options.get("sampled_tokens", 100 * ROUNDS) == 100 * ROUNDS


def test_a_diverged_run_is_known_by_its_message() -> None:
    assert DIVERGED.search(_not_finite(3, float("nan"), 1.0, None, ""))
    assert DIVERGED.search(_not_finite(3, 1.0, float("inf"), None, ""))
    assert not DIVERGED.search("information and finance: loss 4.4")


def write_evaluation(path: Path, rewards: dict[str, dict[str, tuple[float, float]]], nll: float) -> Path:
    """rewards: label → query → (of the second judge, of the model that trained)."""
    rows = [
        {
            "label": label, "policy": label, "query_id": query, "sample": 0, "x": "q", "y": "a film", "tokens": 4,
            "finish": "stop", "rewards": list(both), "reference": "a film", "reference_nll": nll, "reference_tokens": 2,
        }
        for label, own in rewards.items()
        for query, both in own.items()
    ]  # fmt: skip
    models = [{"name": "second", "trained": False}, {"name": "first", "trained": True}]
    save_rows(path, "evaluation", rows, {"reward_models": models})
    return path


def test_the_numbers_of_a_table(tmp_path: Path) -> None:
    """Two seeds, two queries, by hand; the reward model that trained stands second in the files."""
    seeds = [
        {"stable": {"q0": (1.0, 10.0), "q1": (3.0, 30.0)}, "sft": {"q0": (0.0, 5.0), "q1": (1.0, 7.0)}},
        {"stable": {"q0": (2.0, 20.0), "q1": (6.0, 40.0)}, "sft": {"q0": (4.0, 9.0), "q1": (5.0, 11.0)}},
    ]
    files = [write_evaluation(tmp_path / f"{n}.parquet", one, nll=1.0 + n) for n, one in enumerate(seeds)]
    rows = pl.concat([read_evaluation(path, seed) for seed, path in enumerate(files)])
    found = compare({name: rows.filter(label=name) for name in ("stable", "sft")}, {"less": "stable"})
    stable, sft = found["stable"], found["sft"]
    assert (stable["reward"]["mean"], sft["reward"]["mean"]) == (3.0, 2.5)
    assert (stable["trained"]["mean"], sft["trained"]["mean"]) == (25.0, 8.0)
    assert stable["perplexity"]["mean"] == pytest.approx(math.exp((1 + 2) / 4))
    assert stable["length"]["mean"] == 4
    assert stable["second_judge_by_seed"] == [2.0, 4.0]
    assert sft["less"]["mean"] == pytest.approx(0.5)
    assert sft["less"]["by_seed"] == pytest.approx([1.5, -0.5])
    assert stable["less"]["by_seed"] == [0.0, 0.0]


def test_the_highest_reward_chooses_the_rate() -> None:
    runs = [Run(PLE, rate, 0) for rate in (3e-4, 1e-3)] + [Run(METHODS[0], 3e-4, 0)]
    rewards = {runs[0].label: 0.2, runs[1].label: 0.1, runs[2].label: -1.0, "base": 9.0}
    policies = [{"label": label, "metrics": {"reward:r": {"mean": mean}}} for label, mean in rewards.items()]
    with pytest.raises(SystemExit, match="every learning rate diverged"):
        best_rates({"policies": policies}, runs)
    rest = [Run(method, 1e-3, 0) for method in METHODS if method not in (PLE, METHODS[0])]
    policies += [{"label": run.label, "metrics": {"reward:r": {"mean": 0.0}}} for run in rest]
    rates = best_rates({"policies": policies}, [*runs, *rest])
    assert rates == {PLE.name: 3e-4, METHODS[0].name: 3e-4, **{run.method.name: 1e-3 for run in rest}}


def test_rates_of_another_task(tmp_path: Path) -> None:
    methods = [{"method": "base", "learning_rate": None}, {"method": "ple", "learning_rate": 1e-3}]
    (tmp_path / "imdb.json").write_text(json.dumps({"methods": methods}))
    assert read_rates(tmp_path / "imdb.json") == {"ple": 1e-3}
