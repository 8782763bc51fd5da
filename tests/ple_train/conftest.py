"""A store of random pairs and a training on it, for the tests of this folder."""

from pathlib import Path

import pytest

from ple_train import train as training
from schemas.options import Train
from tests.ple_train.small_training import write_pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "data")


@pytest.fixture
def run(policy, pairs, tmp_path):
    """Train into tmp_path/NAME with small defaults → the directory."""

    def run(name: str, **more) -> Path:
        options = {"model": str(policy), "data": [pairs], "round": 1, "learning_rate": 1e-3, "batch_size": 8, **more}
        training.train(Train(output=tmp_path / name, **options))
        return tmp_path / name

    return run
