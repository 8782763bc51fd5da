"""Outputs that older versions left, half-finished and finished, are gone on from as if this version had made them.

A folder of `tests/fixtures` for each version that was released (made by `tests/fixtures/make.py`, never changed
afterwards). Every later version must pass with all of them.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from tests.conftest import ROOT
from tests.fixtures.make import COMMANDS, QUERIES

VERSIONS = sorted(path for path in (ROOT / "tests" / "fixtures").glob("v*") if path.is_dir())
FINISHED = ("round 0", "scores", "training", "sft", "eval", "judge", "purity")


def test_there_are_old_outputs():
    assert VERSIONS


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def old(request, tmp_path) -> Path:
    """A copy of one version's folder."""
    return Path(shutil.copytree(request.param, tmp_path / "moved"))


def ple(folder: Path, name: str, *more: str) -> str:
    """Start one of the old commands there again; what it says."""
    command = [sys.executable, "-m", "cli", *COMMANDS[name].split(), *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


def content(folder: Path) -> dict[str, str]:
    """The digest of every file that another program may read."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("lock")]
    files = [path for path in files if ".ple" not in path.relative_to(folder).parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_was_finished_stays_as_it_is(old):
    """Each command, started again, has nothing to sample, score, train or judge, and changes no table or weight; the
    part of round 1 that had come when it was killed is scored."""
    before = content(old)
    for name in FINISHED:
        ple(old, name)
    after = content(old)
    reports = {path for path in before if path.endswith((".json", "eval.parquet", "purity.parquet"))}
    assert all(path.startswith("data/pairs/round=001/") for path in after.keys() - before.keys())
    assert {path for path in before if after[path] != before[path]} <= reports


def test_a_round_that_was_killed_goes_on_with_what_was_committed(old):
    committed = content(old / "data")
    said = ple(old, "round 1, killed")
    assert "12 pairs sampled" in said or "pairs done before" in said
    rows = pl.read_parquet(old / "data/responses/**/*.parquet", hive_partitioning=False)
    assert sorted(rows["round"].to_list()) == [0] * QUERIES + [1] * QUERIES
    assert len(rows.select("round", "query_id").unique()) == 2 * QUERIES
    kept = content(old / "data")
    assert all(kept[path] == digest for path, digest in committed.items() if "round=000" in path)
    verified = subprocess.run([sys.executable, "-m", "cli", "verify", str(old / "data")], cwd=ROOT, capture_output=True)
    assert verified.returncode == 0, verified.stderr


def test_a_training_that_was_killed_goes_on_from_its_checkpoint(old):
    """The first steps are those of the older version, number by number."""
    checkpoint = max((old / "killed/.ple/checkpoints").glob("checkpoint-*"))
    before = pl.read_parquet(checkpoint / "metrics.parquet")
    ple(old, "training, killed")
    metrics = pl.read_parquet(old / "killed/metrics.parquet")
    assert metrics["step"].to_list() == list(range(1, 181))
    assert metrics["loss"].to_list()[: len(before)] == before["loss"].to_list()
    record = json.loads((old / "killed/ple.json").read_text())
    assert (record["steps"], record["settings"]["epochs"]) == (180, 60)


def test_a_run_that_was_stopped_between_stages_goes_on(old):
    said = ple(old, "run, stopped")
    assert "[1/3] round 0 gen: done before" in said
    assert "[2/3] round 0 score: done before" in said
    assert (old / "run/policy/round=000/ple.json").exists()
    stages = json.loads((old / "run/stages.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages if stage["exit_code"] == 0] == ["gen", "score", "train"]


def test_what_was_trained_by_an_older_version_starts_the_next_round(old):
    """Its adapter samples a round, and is trained on."""
    gen = COMMANDS["round 0"].replace("--round 0", "--round 2").split()
    train = COMMANDS["training"].replace("--output trained", "--output next --adapter trained").split()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for words in ([*gen, "--adapter", "trained"], train):
        ended = subprocess.run(
            [sys.executable, "-m", "cli", *words], cwd=old, env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
