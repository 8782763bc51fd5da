"""The paper's tables (benchmarks/paper): every run is a command that `ple` takes; the numbers. Trains nothing."""

import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import cli
from benchmarks.paper.__main__ import best_rates, main, read_rates
from benchmarks.paper.commands import DIVERGED
from benchmarks.paper.methods import FRONTIER, MAIN, METHODS, WARM, Run, batch_size
from benchmarks.paper.tables import compare, read_evaluation
from benchmarks.paper.tasks import TASKS
from ple_data.storage.parquet import save_rows
from ple_train.engine.loop import _not_finite
from ple_train.train import settled
from schemas.options import Train
from schemas.recipe import load_recipe

PLE = next(method for method in METHODS if method.name == "ple")


@pytest.mark.parametrize("method", FRONTIER, ids=lambda method: method.name)
@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_every_run_is_a_command_of_ours(task, method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "queries.parquet").touch()
    brake = None if method.brake == "learning_rate" else method.brakes[-1]
    run = Run(method, 3e-3, 1, brake)
    commands = run.commands(task)
    if method.baseline in ("sft", "ppo"):
        ((_, name, *words),) = commands
        options = cli.ple.commands["baseline"].commands[name].make_context(name, list(words)).params
        assert (options["learning_rate"], options["seed"], options["output"]) == (3e-3, 1, run.adapter(task))
    else:
        recipe = load_recipe(Path(f"{run.directory}.yaml"))
        assert (recipe.rounds, recipe.seed, recipe.alpha) == (task.rounds, 1, method.alpha)
        assert recipe.queries_per_round * method.responses == 2 * task.queries_per_round
        options = (recipe.baseline or recipe.train).model_dump()
        assert options["learning_rate"] == 3e-3
        if recipe.baseline is None:
            settled(Train(model="m", data=(), round=0, output=Path(), **without_command(options)))
    assert brake is None or options[method.brake] == brake


def without_command(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("command", "launch")}


def test_rounds_that_see_their_own_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of `ple run`, but each round is round 0 of a store of its own, with the threshold of its number."""
    monkeypatch.chdir(tmp_path)
    method = next(method for method in FRONTIER if method.newest)
    commands = Run(method, 1e-3, 0, method.brakes[0]).commands(TASKS["imdb"])
    assert [words[0] for words in commands] == ["gen", "score", "train"] * TASKS["imdb"].rounds
    for at, words in enumerate(commands):
        assert words[words.index("--data") + 1].endswith(f"data/round={at // 3}")
        assert words[words.index("--round") + 1] == "0"
        assert not set(WARM) & set(words)
    assert commands[-1][commands[-1].index("--tau0") + 1] == str(0.2 * 0.9**3)
    assert commands[-1][commands[-1].index("--adapter") + 1].endswith("policy/round=002")


def test_no_two_points_share_a_directory() -> None:
    runs = [Run(m, 1e-3, 0, None if m.brake == "learning_rate" else b) for m in FRONTIER for b in m.brakes]
    assert all(len(method.brakes) in ((4,) if method in MAIN else (1, 2)) for method in FRONTIER)
    rates = [run for run in runs if run.brake is None]
    assert len({run.directory for run in runs}) == len(runs) - len(rates) + len({run.method for run in rates})
    assert {method.ablates for method in FRONTIER} <= {None, *(method.name for method in MAIN)}


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
    (tmp_path / "frontier.json").write_text(json.dumps({"rates": {"dpo": 3e-4}}))
    assert read_rates(tmp_path / "frontier.json") == {"dpo": 3e-4}


def test_rates_that_are_not_there_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "imdb.parquet").touch()
    words = ["paper", "imdb", "--data", tmp_path / "imdb.parquet", "--output", tmp_path / "out", "--rates", "none.json"]
    monkeypatch.setattr("sys.argv", list(map(str, words)))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("error: --rates none.json: there is no such file\n")
    assert not (tmp_path / "out").exists()


def test_the_budgets_are_those_that_the_pages_tell() -> None:
    found = {t.name: (t.rounds, t.queries_per_round, batch_size(t), t.reward_epochs) for t in TASKS.values()}
    assert found == {
        "imdb": (4, 256, 16, 1),
        "imdb-bare": (4, 256, 16, 1),
        "imdb-smollm2": (2, 256, 16, 2),
        "imdb-qwen": (2, 256, 16, 2),
        "imdb-gemma": (2, 256, 16, 2),
        "tldr": (4, 128, 8, 4),
        "hh": (4, 128, 8, 2),
    }


def test_what_a_run_took_is_told_by_its_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every round; PPO makes an update in each pass over a batch."""
    monkeypatch.chdir(tmp_path)
    methods = {method.name: method for method in METHODS}

    def write(folder: Path, steps: int, **settings: int) -> None:
        folder.mkdir(parents=True)
        cost = {"tokens_sampled": 10, "tokens_trained": 30}
        (folder / "ple.json").write_text(json.dumps({"steps": steps, "settings": settings, "cost": cost}))

    dpo, ppo = Run(methods["dpo"], 1e-3, 0, 0.1), Run(methods["ppo"], 1e-3, 0, 0.05)
    for at in range(2):
        write(dpo.directory / "policy" / f"round=00{at}", 16)
    write(ppo.directory / "policy", 5, ppo_epochs=4)
    assert dpo.costs() == {"tokens_sampled": 20, "tokens_trained": 60, "updates": 32}
    assert ppo.costs() == {"tokens_sampled": 10, "tokens_trained": 30, "updates": 20}
