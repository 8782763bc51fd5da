"""The frontier's runs (benchmarks/paper) with tiny real models, as forks of one process (warm.py)."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from benchmarks.paper.commands import warm_commands, write_round0
from benchmarks.paper.methods import WARM
from benchmarks.paper.sweep import is_whole, show_points, sweep
from benchmarks.paper.tasks import Task
from ple_data.storage.store import Store
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def warm() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        with warm_commands():
            yield


def outcome(command: list[str], cwd: Path) -> tuple[int, str, str]:
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=cwd)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.parametrize("words", [["verify", "missing"], ["gen", "--help"], ["run"]], ids=" ".join)
def test_a_fork_is_the_command(warm: None, tmp_path: Path, words: list[str]) -> None:
    assert outcome([*WARM, *words], tmp_path) == outcome(["-m", "cli", *words], tmp_path)


def test_a_command_ends_with_its_caller(warm: None, tmp_path: Path) -> None:
    """The caller is killed while a stage of `ple run` sleeps. Its pipe ends when nobody of them is left."""
    sleeping = "import sys, time; print('asleep', file=sys.stderr, flush=True); time.sleep(300)"
    recipe = {"model": "m", "queries": "q", "principles": "none", "reward_model": "r", "run_dir": "run"}
    recipe |= {"gen": {"command": [sys.executable, "-c", sleeping]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    asking = f"import subprocess; subprocess.run({[sys.executable, *WARM, 'run', 'recipe.yaml']!r})"
    with subprocess.Popen([sys.executable, "-c", asking], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as caller:
        assert caller.stderr is not None
        assert "asleep\n" in iter(caller.stderr.readline, "")
        caller.kill()
        caller.stderr.read()


REWARD = "def score(xs, ys):\n    return [{} for y in ys]\n"


def tiny_task(directory: Path, policy: Path) -> Task:
    """16 queries a round, 4 unseen ones, responses of 4 tokens, two rewards in Python."""
    shutil.copytree(policy, directory / "start")
    words = ["good film", "bad film", "a fine day", "the end", "dull plot"]
    rows = [{"id": f"{n}", "x": f"{words[n % 5]} {words[n % 4]} {n}", "reference": words[n % 3]} for n in range(40)]
    for name, own in {"queries": rows[:36], "unseen": rows[36:], "validation": rows[36:]}.items():
        pl.DataFrame(own).write_parquet(directory / f"{name}.parquet")
    specs = {}
    for name, value in {"trained": "y.count('a') - y.count('e')", "judge": "float(len(y))"}.items():
        (directory / f"{name}.py").write_text(REWARD.format(value))
        specs[name] = f"{name}.py:score"
    return Task("tiny", "Tiny", "imdb", lambda *_: None, (), 4, specs["trained"], specs["judge"], "", 16)


@pytest.mark.long
def test_points_are_made_once(
    warm: None, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run of `ple run` and one of single commands; the second call finds both, and starts nothing but the start
    policy's evaluation."""
    monkeypatch.chdir(tmp_path)
    task, only = tiny_task(tmp_path, policy), ["dpo:0.03", "ple-residual-newest"]
    write_round0(task, [0], 2)
    told = []
    for _ in range(2):
        show_points(task, tmp_path / "results", [0], 2, {"dpo": 1e-2, "ple-residual": 1e-2}, only)
        out, messages = capsys.readouterr()
        told.append([json.loads(line) for line in out.splitlines()])
    assert told[0] == told[1]
    assert messages == ""
    assert [point["point"] for point in told[0]] == ["dpo-0.03-0.01", "ple-residual-newest-1.5-0.01"]
    assert all(point["kl"]["mean"] != 0 and point["judge"] != point["reward"] for point in told[0])
    newest, whole = (Store(next(Path("runs", name).glob("**/" + data))) for name, data in DATA.items())
    assert len(newest.shards("pairs")) == 1
    assert {shard.round for shard in whole.shards("pairs")} == {0, 1, 2, 3}
    begun = Store(Path("round0", "guided", "seed=0")).scan("responses").select("query_id", "y", "y_prompt").collect()
    taken = whole.scan("pairs").filter(pl.col("round") == 0).select("query_id", "y", "y_prompt").collect()
    assert set(taken.rows()) < set(begun.rows())


@pytest.mark.long
def test_a_sweep_goes_on_from_its_record(
    warm: None, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two methods with one brake each; then everything but the results is gone, and nothing is left to do."""
    monkeypatch.chdir(tmp_path)
    task = replace(tiny_task(tmp_path, policy), rate=1e-2, brakes={"dpo": (0.03,), "ple": (1e-3,)})
    write_round0(task, [0], 2)
    results = tmp_path / "results"
    assert not is_whole(task, results, [0])
    sweep(task, results, [0], 2, None)
    assert is_whole(task, results, [0])
    kept = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert {"tiny-frontier.json", "seed=0.parquet", "tiny-answers.md"} <= {path.name for path in kept}
    for name in ("runs", "eval", "start"):
        shutil.rmtree(name)
    sweep(task, results, [0], 2, None)
    assert {path for path, data in kept.items() if path.read_bytes() != data} <= {results / "tiny-frontier.png"}


DATA = {"ple-residual-newest": "data/round=3", "dpo": "data"}
