"""The training benchmark runs in one command, without its peers; what it measures is not tested."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SMALL = "--contenders ours --shape small --vocabulary 512 --hidden 64 --layers 1 --pairs 16 --repeats 1 --threads 1"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        pytest.param("--profile", "matrix products", marks=pytest.mark.long),
        pytest.param("--memory", "MiB", marks=pytest.mark.long),
        pytest.param("", "useful tokens/s", marks=pytest.mark.long),
    ],
)
def test_ours_alone_is_measured_in_one_command(more: str, expected: str) -> None:
    words = f"-m benchmarks.train {SMALL} {more}".split()
    found = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert expected in found.stdout


@pytest.mark.long
def test_a_models_own_weights_are_measured(policy: Path) -> None:
    words = (
        f"-m benchmarks.real_speed {policy} --contenders ours --pairs 8 --repeats 1 --threads 1 --lengths hh".split()
    )
    found = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    for each in ("a product of matrices of its own shape", "sampling with hf", "ours: "):
        assert each in found.stdout
