"""The digest of a training file, and a shuffled stream over sequences in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ple_train.model.batches import Sequence
from schemas.files import sha256_file


def file_digest(data: Path) -> str | None:
    """SHA-256 of a data file; None for a hub dataset, whose id and revision stand for it."""
    return sha256_file(data) if Path(data).is_file() else None


class ShuffledSequences:
    """Global batches of `batch_size` sequences, ordered by (seed, epoch); the last one is short."""

    def __init__(
        self, sequences: list[Sequence], batch_size: int, seed: int, divisor: Callable[[list[Sequence]], int]
    ) -> None:
        self.sequences, self.batch_size, self.seed, self.divisor = sequences, batch_size, seed, divisor
        self.steps_per_epoch = -(-len(sequences) // batch_size)

    def batches(self, epoch: int, start: int) -> Iterator[tuple[list[Sequence], int]]:
        """The epoch's batches from the start-th on, each with its divisor."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.sequences))
        for first in range(start * self.batch_size, len(order), self.batch_size):
            batch = [self.sequences[i] for i in order[first : first + self.batch_size]]
            yield batch, self.divisor(batch)
