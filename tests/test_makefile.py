"""The environments of the Makefile: made where there are none, and anew where an earlier try has failed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

PYTHON = """#!/bin/sh
# Stands for Python: `-m venv DIR` makes an environment of itself, `-c` checks as the file `fits` beside it says.
here=$(dirname "$(realpath "$0")")
case "$*" in
  *"-m venv"*) for last; do :; done; echo "venv $*" >> "$here/calls"
    mkdir -p "$last/bin"; ln -sf "$here/python" "$last/bin/python"; ln -sf /bin/true "$last/bin/pip"
    test ! -e "$here/no-venv" || exit 1; touch "$last/whole";;
  *"import pip"*) test -e "$(dirname "$0")/../whole" && test ! -e "$here/old";;
  *) test ! -e "$here/old";;
esac
"""


@pytest.fixture
def tried(tmp_path: Path):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    bin, place = tmp_path / "bin", tmp_path / "place"
    for folder in (bin, place):
        folder.mkdir()
    (bin / "python").write_text(PYTHON)
    (bin / "python").chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, place / name)

    def start() -> subprocess.CompletedProcess:
        words = ["make", "plain", f"PYTHON={bin / 'python'}"]
        return subprocess.run(words, cwd=place, capture_output=True, text=True, check=False)

    return bin, place, start


def calls(bin: Path) -> int:
    return len((bin / "calls").read_text().splitlines()) if (bin / "calls").exists() else 0


def test_an_environment_without_pip_is_made_anew(tried) -> None:
    bin, place, start = tried
    (bin / "no-venv").touch()
    failed = start()
    assert failed.returncode != 0
    assert "install python3-venv" in failed.stdout
    assert (place / ".venv" / "bin" / "python").exists()
    (bin / "no-venv").unlink()
    assert start().returncode == 0
    assert "--clear" in (bin / "calls").read_text().splitlines()[-1]
    assert calls(bin) == 2
    (place / ".venv" / ".plain").unlink()
    assert start().returncode == 0
    assert calls(bin) == 2, "what is whole is used"


def test_an_old_python_is_refused_before_anything_is_made(tried) -> None:
    bin, place, start = tried
    (bin / "old").touch()
    failed = start()
    assert failed.returncode != 0
    assert "ple needs Python 3.11 or newer: make plain PYTHON=python3.12" in failed.stdout
    assert not (place / ".venv").exists()
