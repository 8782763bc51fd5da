"""A sample of the inputs of `make hostile`; the seed stays, so that a failure can be repeated."""

from pathlib import Path

import pytest

from tests.faults.disk import compiler
from tests.hostile.__main__ import run

MOST = 1
"""Inputs of each family."""


@pytest.mark.skipif(compiler() is None, reason="no C compiler (cc): the failing disk is a small C library")
def test_every_hostile_input_ends_in_one_sentence(tmp_path: Path) -> None:
    assert [str(verdict) for verdict in run(tmp_path, MOST, seed=17)] == []
