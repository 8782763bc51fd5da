"""A reward model that is many: units of responses, each scored by one of the models that Ray's actors hold.

Only the process that was called claims, reads and writes. The model must be where the workers run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ple_data.common.workers import Pool, Wanted
from ple_data.rewards import Key, RewardModel, kind_of, load_reward_model
from schemas.errors import UsageError
from schemas.options import Rewards

Rows = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Told:
    """What a worker's model says of itself, as `RewardModel` does."""

    name: str
    runs_on: bool


class WorkersReward(RewardModel):
    """The reward models of several workers."""

    def __init__(self, spec: str, options: Rewards, wanted: Wanted, say: Callable[[str], None]) -> None:
        """Start them, and wait for the first. Raises UsageError, PleError."""
        if options.reward_device == "cpu" or kind_of(spec) == "endpoint":
            wanted = replace(wanted, gpus=0)
        self._pool: Pool[Any, Rows, tuple[list[float], int]] = Pool(partial(_Scorer, spec, options), wanted, say)
        self.state = self._pool.state
        told = next(iter(self._pool.told.values()))
        self.name, self.runs_on = told.name, told.runs_on
        self._first = told

    def score_each(self, jobs: Iterator[tuple[Key, Rows]]) -> Iterator[tuple[Key, list[float]]]:
        for key, (rewards, cut) in self._pool.each(jobs):
            if other := next((told for told in self._pool.told.values() if told != self._first), None):
                raise UsageError(f"the workers have several reward models: {self._first.name} and {other.name}")
            self.truncated += cut
            yield key, rewards

    def stream(self, rows: Rows) -> Iterator[list[tuple[int, float]]]:
        for _, rewards in self.score_each(iter([("rows", rows)])):
            yield list(enumerate(rewards))

    def close(self) -> None:
        """End the workers."""
        self._pool.close()


class _Scorer:
    """The reward model of one worker."""

    def __init__(self, spec: str, options: Rewards) -> None:
        self._model = load_reward_model(spec, options)
        self.told = Told(self._model.name, self._model.runs_on)

    def __call__(self, rows: Rows) -> tuple[list[float], int]:
        before = self._model.truncated
        return self._model.score(rows), self._model.truncated - before
