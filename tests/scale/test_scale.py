"""Two machines of a real cluster killed while rows are sampled and scored; `make scale` kills thirty."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytest.importorskip("ray")


@pytest.mark.long
def test_machines_that_are_killed_change_no_row() -> None:
    """A process of its own: Ray and its cluster leave threads and variables behind."""
    command = [sys.executable, "-m", "tests.scale", "--kills", "2", "--seed", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 machines killed" in ended.stdout
