"""Small stores of random pairs, and what tests do with trainings on them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ple_data.storage.store import Store
from ple_train.objectives.pairs import PairObjective
from tests.tables import table

ROWS_PER_SHARD = 7


def write_pairs(root: Path, rounds: int = 2, shards: int = 3, seed: int = 0) -> Path:
    """A store of random pairs: margins on both sides of tau, responses of 1 to 24 tokens."""
    numbers = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return numbers.integers(3, 300, numbers.integers(low, high)).tolist()

    for round in range(rounds):
        for index in range(shards):
            rows = [
                {
                    "query_id": f"q{seed}-{index}-{n}",
                    "x_ids": ids(2, 9),
                    "y_ids": ids(1, 24),
                    "y_prompt_ids": ids(1, 24),
                    "s": float(numbers.normal()),
                    "s_prompt": float(numbers.normal()),
                }
                for n in range(ROWS_PER_SHARD)
            ]
            Store(root).commit("pairs", round, f"{index:05d}-{seed:012x}", table("pairs", rows, round), {})
    return root


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def stop_in_step(patch: pytest.MonkeyPatch, number: int) -> None:
    original = PairObjective.__call__

    def stop(self, model, batch, step):
        if step == number - 1:
            raise KeyboardInterrupt
        return original(self, model, batch, step)

    patch.setattr(PairObjective, "__call__", stop)
