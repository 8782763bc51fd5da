"""benchmarks/paper/warm.py: `ple` commands as forks of one process. Real processes; nothing is trained."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.paper.commands import warm_commands
from benchmarks.paper.methods import WARM
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
