"""The paper's tables (benchmarks/paper): every run is a command that `ple` takes. Trains nothing."""

import json
from pathlib import Path

import pytest

import cli
from benchmarks.paper.__main__ import DIVERGED
from benchmarks.paper.methods import METHODS, PLE, ROUNDS, Run
from benchmarks.paper.tasks import TASKS
from ple_train.loop import _not_finite
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
