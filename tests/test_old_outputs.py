"""Outputs that older versions left, half-finished and finished, are gone on from as if this version had made them.

A folder of `tests/fixtures` for each version that was released (made by `tests/fixtures/make.py`, never changed
afterwards). Every later version must pass with all of them.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pytest

from tests.conftest import ROOT
from tests.fixtures.make import COMMANDS, QUERIES
from tests.forks import ForkServer

VERSIONS = sorted(path for path in (ROOT / "tests" / "fixtures").glob("v*") if path.is_dir())
FINISHED = ("round 0", "scores", "training", "sft", "eval", "judge", "purity")


def test_there_are_old_outputs():
    assert VERSIONS


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def old(request, tmp_path) -> Path:
    """A copy of one version's folder."""
    return Path(shutil.copytree(request.param, tmp_path / "moved"))


@pytest.fixture(scope="module")
def forks() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def ple(old, tmp_path, forks) -> Callable[..., str]:
    """Starts a command in the copied folder, or by its name one of the old ones again; what it says."""

    def start(*words: str) -> str:
        argv = COMMANDS[words[0]].split() if len(words) == 1 else [*words]
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        code, _ = forks.run(argv, log, cwd=str(old))
        assert code == 0, log.read_text()
        return log.read_text()

    return start


WITH_ANOTHER_OPTION = """
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_loader

class Loader(SourceFileLoader):
    def path_stats(self, path):
        raise OSError("never from a cache")

    def get_data(self, path):
        text = super().get_data(path).decode()
        for group in ("class Steps(Options):", "class Sampling(Options):"):
            assert group in text
            line = f'    thrown_away_{group[6:9].lower()}: int = option(3, "Thrown away.", TRAINING, least=1)'
            text = text.replace(group, f"{group}\\n{line}")
        return text.encode()

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "schemas.options.groups":
            return spec_from_loader(name, Loader(name, path[0] + "/groups.py"))

sys.meta_path.insert(0, Finder())
from cli import ple
ple(prog_name="ple")
"""
"""This program as a later version that has one more option of training and one of sampling."""


@pytest.mark.parametrize("name", ["training", "round 0", "training, killed", "round 1, killed", "run, stopped", "eval"])
def test_an_option_that_an_older_output_does_not_know_counts_as_its_default(old, name):
    """So that every later version may add one: nothing is refused, nothing is sampled or trained anew."""
    committed = content(old / "data")
    later(old, name)
    kept = content(old / "data")
    assert all(kept[path] == digest for path, digest in committed.items())


def test_an_option_that_an_older_output_does_not_know_is_refused_at_another_value(old):
    ended = later(old, "training, killed", "--thrown-away-ste", "4", code=2)
    assert "thrown_away_ste: 3 then, 4 now" in ended
    ended = later(old, "round 1, killed", "--thrown-away-sam", "4", code=2)
    assert "thrown_away_sam: 4, there 3" in ended


def later(folder: Path, name: str, *more: str, code: int = 0) -> str:
    """One of the old commands by the later version; what it says."""
    command = [sys.executable, "-c", WITH_ANOTHER_OPTION, *COMMANDS[name].split(), *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    return ended.stderr


def content(folder: Path) -> dict[str, str]:
    """The digest of every file that another program may read."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("lock")]
    files = [path for path in files if ".ple" not in path.relative_to(folder).parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_was_finished_stays_as_it_is(old, ple):
    """Each command, started again, has nothing to sample, score, train or judge, and changes no table or weight; the
    part of round 1 that had come when it was killed is scored, and the KL of the evaluation, which 0.1.0 did not have,
    is measured beside what there was."""
    before = content(old)
    for name in FINISHED:
        ple(name)
    after = content(old)
    reports = {path for path in before if path.endswith((".json", "eval.parquet", "purity.parquet"))}
    added = ("data/pairs/round=001/", "evaluation/logps/")
    assert all(path.startswith(added) for path in after.keys() - before.keys())
    metrics = json.loads((old / "evaluation/eval.json").read_text())["policies"][1]["metrics"]
    assert metrics["kl"]["count"] == 6
    assert {path for path in before if after[path] != before[path]} <= reports


def test_a_round_that_was_killed_goes_on_with_what_was_committed(old, ple):
    committed = content(old / "data")
    said = ple("round 1, killed")
    assert "12 pairs sampled" in said or "pairs done before" in said
    rows = pl.read_parquet(old / "data/responses/**/*.parquet", hive_partitioning=False)
    assert sorted(rows["round"].to_list()) == [0] * QUERIES + [1] * QUERIES
    assert len(rows.select("round", "query_id").unique()) == 2 * QUERIES
    kept = content(old / "data")
    assert all(kept[path] == digest for path, digest in committed.items() if "round=000" in path)
    ple("verify", "data")


def test_a_training_that_was_killed_goes_on_from_its_checkpoint(old, ple):
    """The first steps are those of the older version, number by number."""
    checkpoint = max((old / "killed/.ple/checkpoints").glob("checkpoint-*"))
    before = pl.read_parquet(checkpoint / "metrics.parquet")
    ple("training, killed")
    metrics = pl.read_parquet(old / "killed/metrics.parquet")
    assert metrics["step"].to_list() == list(range(1, 181))
    assert metrics["loss"].to_list()[: len(before)] == before["loss"].to_list()
    record = json.loads((old / "killed/ple.json").read_text())
    assert (record["steps"], record["settings"]["epochs"]) == (180, 60)


def test_a_run_that_was_stopped_between_stages_goes_on(old, ple):
    said = ple("run, stopped")
    assert "[1/3] round 0 gen: done before" in said
    assert "[2/3] round 0 score: done before" in said
    assert (old / "run/policy/round=000/ple.json").exists()
    stages = json.loads((old / "run/stages.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages if stage["exit_code"] == 0] == ["gen", "score", "train"]


def test_what_was_trained_by_an_older_version_starts_the_next_round(ple):
    """Its adapter samples a round, and is trained on."""
    gen = COMMANDS["round 0"].replace("--round 0", "--round 2").split()
    train = COMMANDS["training"].replace("--output trained", "--output next --adapter trained").split()
    ple(*gen, "--adapter", "trained")
    ple(*train)


def test_folders_that_were_moved_or_renamed_are_the_same_ones(old, ple):
    """Model, data and adapter count by what is in them: a killed training goes on, a finished one stays."""
    for name in ("policy", "data", "sft.jsonl"):
        (old / name).rename(old / f"new-{name}")
    for name, moved in {
        "training": ("policy", "data"),
        "training, killed": ("policy", "data"),
        "sft": ("policy", "sft.jsonl"),
    }.items():
        words = [f"new-{word}" if word in moved else word for word in COMMANDS[name].split()]
        assert ("is complete already" in ple(*words)) == (name != "training, killed")


def test_a_training_begun_in_float32_is_never_gone_on_with_in_bf16_unasked(old):
    """`auto` goes on in what it was begun with, wherever it is started again."""
    state = max((old / "killed/.ple/checkpoints").glob("checkpoint-*/state.json"))
    state.write_text(state.read_text().replace('"precision": "auto"', '"precision": "float32"'))
    gpu = "import torch; from ple_train.model import policy; policy.natural_dtype = lambda _: torch.bfloat16"
    gpu += "; import cli; cli.ple()"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(*more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", gpu, *COMMANDS["training, killed"].split(), *more]
        return subprocess.run(command, cwd=old, env=environment, capture_output=True, text=True)

    asked = start("--precision", "bf16")
    assert asked.returncode == 2
    assert re.search("precision: '(auto|float32)' then, 'bf16' now", asked.stderr)
    ended = start()
    assert ended.returncode == 0, ended.stderr
    assert "in float32" in ended.stderr
