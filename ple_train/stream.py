"""Pairs of a frozen snapshot → global batches of weighted sequences. Reads committed shards; never writes.

The order is a function of (seed, epoch) alone: shards are permuted, read a window at a time, and the rows of a
window are permuted. Memory holds one window. The partition (set, coefficients) is that of `ple_data.partition`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import polars as pl

from ple_data.partition import partition, tau
from ple_data.selection import refuse_of_pairs
from ple_data.storage.store import collect, scan_shards
from ple_train.model.batches import Sequence
from ple_train.snapshot import ID_COLUMNS, SnapshotShard, base_of, base_of_round, fits, read_rows
from schemas.errors import UsageError
from schemas.options import Train
from schemas.tables import ARMS

WINDOW_ROWS = 16_384
STREAMED = ["query_id", "round", "s", "s_prompt", *ID_COLUMNS]


@dataclass(frozen=True)
class Response:
    """What an objective knows of a sequence: its arm, its pair's set and age in rounds, and its coefficient of Eq. 6.

    margin: s_prompt - s of its pair. start: log pi_0(response | x) in nats, where it is kept. quantile: the share of
    the plain responses to its query in its round whose reward is at most its own, where the objective asks for it.
    """

    arm: str
    set: str
    age: int
    coefficient: float
    margin: float = 0.0
    start: float | None = None
    quantile: float = 0.0


class PairStream:
    """Global batches of `batch_size` pairs (two sequences each); the last of an epoch is short, never dropped.

    beside: more columns of a shard's rows, in their order: `start_y` and `start_y_prompt`, log pi_0 of both arms in
    nats. In an ablation of the printed loss (`without`) responses with the coefficient 0 stay out: they would cost and
    teach nothing. Raises UsageError where quantiles are asked for and a query has one plain response in its round.
    """

    def __init__(
        self,
        snapshot: list[SnapshotShard],
        options: Train,
        limits: Limits,
        window_rows: int = WINDOW_ROWS,
        beside: Callable[[SnapshotShard], pl.DataFrame] | None = None,
        quantiles: bool = False,
    ) -> None:
        self.snapshot, self.limits, self.window_rows, self.beside = snapshot, limits, window_rows, beside
        self._plain_rewards = plain_rewards(snapshot) if quantiles else None
        self._columns = [*STREAMED, *(["reward_model"] if quantiles else [])]
        self.round, self.max_length = options.round, options.max_length
        self.skip_zeros = options.without is not None and options.objective == "ple"
        self.batch_size, self.seed = options.batch_size, options.seed
        threshold = tau(options.tau0, options.alpha, options.round)
        self.partition = partition(
            threshold, normalize_wsft=options.normalize_wsft, anchor=options.sft_anchor, without=options.without
        )
        self.pairs = sum(s.rows for s in snapshot)
        self.steps_per_epoch = -(-self.pairs // self.batch_size)

    def batches(self, epoch: int, start: int) -> Iterator[tuple[list[Sequence], int]]:
        """The epoch's batches from the start-th on: sequences, and the number of pairs they come from."""
        pending: list[pl.DataFrame] = []
        rows_waiting = 0
        for window in self._windows(epoch, start * self.batch_size):
            pending.append(window)
            rows_waiting += window.height
            if rows_waiting < self.batch_size:
                continue
            rows = pl.concat(pending)
            whole = rows.height - rows.height % self.batch_size
            for first in range(0, whole, self.batch_size):
                yield self._sequences(rows[first : first + self.batch_size])
            pending, rows_waiting = [rows[whole:]], rows.height - whole
        if rows_waiting:
            yield self._sequences(pl.concat(pending))

    def _windows(self, epoch: int, skip: int) -> Iterator[pl.DataFrame]:
        """Shuffled windows of rows from the `skip`-th row of the epoch on; windows before it are not read."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.snapshot))
        window: list[SnapshotShard] = []
        number = 0
        for place, index in enumerate(order):
            window.append(self.snapshot[index])
            rows = sum(s.rows for s in window)
            if rows < self.window_rows and place + 1 < len(order):
                continue
            if skip < rows:
                shuffle = np.random.default_rng([self.seed, epoch, number]).permutation(rows)[skip:]
                frames = [read_rows(part, self._columns, self.max_length, self.beside) for part in window]
                yield pl.concat(frames)[shuffle].with_columns(self.partition)
            skip = max(0, skip - rows)
            window, number = [], number + 1

    def _sequences(self, rows: pl.DataFrame) -> tuple[list[Sequence], int]:
        sequences = []
        for number, row in enumerate(rows.iter_rows(named=True)):
            for arm, coefficient, reward in zip(
                ARMS, (row["c"], row["c_prompt"]), (row["s"], row["s_prompt"]), strict=True
            ):
                if self.skip_zeros and coefficient == 0:
                    continue
                ids = checked_ids(row, f"{arm}_ids", arm, self.limits)
                start, quantile = row.get(f"start_{arm}"), self._quantile(row, reward)
                age = self.round - row["round"]
                tag = Response(arm, row["set"], age, coefficient, row["margin"], start, quantile)
                sequence = Sequence(ids, len(row["x_ids"]), tag, query=number)
                if sequence.response > 0:
                    sequences.append(sequence)
        return sequences, rows.height

    def _quantile(self, row: dict[str, Any], reward: float) -> float:
        if self._plain_rewards is None:
            return 0.0
        rewards = self._plain_rewards[row["round"], row["query_id"], row["reward_model"]]
        return float(np.mean(rewards <= np.float32(reward)))


def plain_rewards(snapshot: list[SnapshotShard]) -> dict[tuple[int, str, str], np.ndarray]:
    """Rewards of the plain responses by round, query and reward model. Raises UsageError where there is one alone."""
    rows = scan_shards("pairs", [part.shard for part in snapshot])
    found = collect(rows.group_by("round", "query_id", "reward_model").agg(pl.col("s")))
    refuse_of_pairs(found["reward_model"].unique())
    alone = found.filter(pl.col("s").list.len() < 2)
    if alone.height:
        raise UsageError(
            f"--objective qrpo compares a response with others to its query, and {alone.height} of {found.height} "
            "queries have one plain response alone: sample more with ple-gen --samples 4, or take another objective"
        )
    return {(t, query, by): np.array(rewards, dtype=np.float32) for t, query, by, rewards in found.iter_rows()}


class Limits(Protocol):
    """What a model can take: token ids below `vocabulary`, and at most `positions` of them where it has a limit."""

    vocabulary: int
    positions: int | None


def checked_ids(row: dict[str, Any], column: str, name: str, limits: Limits) -> np.ndarray:
    """Ids of x and of the response in a column of a row, [n] int32; `name` is the response in messages.

    Raises UsageError where they are not the model's, or more than it has positions.
    """
    ids = np.array([*row["x_ids"], *row[column]], dtype=np.int32)
    what = f"query {row['query_id']!r} of round {row['round']}: x and {name}"
    if ids.size and ids.max() >= limits.vocabulary:
        raise UsageError(
            f"{what} hold token {ids.max()}, but the model's vocabulary has {limits.vocabulary}; these pairs were made "
            "with another tokenizer"
        )
    if limits.positions is not None and ids.size > limits.positions:
        raise UsageError(
            f"{what} have {ids.size} tokens, over the {limits.positions} positions of the model; use --max-length "
            f"{limits.positions}"
        )
    return ids


def refuse_unfit_pairs(parts: list[SnapshotShard], limits: Limits, max_length: int | None, policy: str) -> None:
    """Raise UsageError where a pair that will be trained on is not for the model: see `checked_ids`.

    So that no training stops at such a pair after hours, the token ids of all rounds are read once; but not of rounds
    that were begun with this very base model (`policy` is a name with digests), of which ple-gen has seen to it. What
    was put among its files by hand is refused when its turn comes.
    """
    bases = {key: base_of_round(*key) for key in {(p.store, p.shard.round) for p in parts}}
    foreign = [p.shard for p in parts if bases[p.store, p.shard.round] != base_of(policy)]
    rows = scan_shards("pairs", foreign)
    rows = rows if max_length is None else rows.filter(fits(max_length))
    unfit = pl.any_horizontal(pl.col(name).list.max() >= limits.vocabulary for name in ID_COLUMNS)
    if limits.positions is not None:
        unfit |= ~fits(limits.positions)
    columns = ["query_id", "round", *ID_COLUMNS]
    for row in collect(rows.filter(unfit).head(1).select(columns)).iter_rows(named=True):
        for arm in ARMS:
            checked_ids(row, f"{arm}_ids", arm, limits)
