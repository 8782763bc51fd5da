"""The training benchmark runs in one command, without its peers; what it measures is not tested."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

SMALL = "--contenders ours --shape small --vocabulary 512 --hidden 64 --layers 1 --pairs 16 --repeats 1 --threads 1"


@pytest.mark.parametrize(
    ("more", "expected"), [("", "useful tokens/s"), ("--profile", "matrix products"), ("--memory", "MiB")]
)
def test_ours_alone_is_measured_in_one_command(more: str, expected: str) -> None:
    words = f"-m benchmarks.train {SMALL} {more}".split()
    found = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert expected in found.stdout
