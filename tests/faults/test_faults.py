"""A sample of the faults of `make faults`; another one in every run would be hard to repeat, so the seed stays."""

from pathlib import Path

import pytest

from tests.faults.__main__ import run
from tests.faults.disk import compiler

MOST = 1
"""Faults of each stage."""


@pytest.mark.long
@pytest.mark.skipif(compiler() is None, reason="no C compiler (cc): the failing disk is a small C library")
def test_no_fault_of_the_disk_loses_or_changes_anything(tmp_path: Path) -> None:
    assert [str(finding) for finding in run(tmp_path, MOST, seed=17)] == []
