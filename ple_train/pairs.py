"""Pairs of a frozen snapshot → global batches of weighted sequences. Reads committed shards; never writes.

The order is a function of (seed, epoch) alone: shards are permuted, read a window at a time, and the rows of a
window are permuted. Memory holds one window, however many rows there are. The partition (set, coefficients) comes
from `ple_data.partition`, the one home of Eqs. 3 to 5 and 7.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl

from ple_data.digests import digests_of
from ple_data.partition import Without, partition
from ple_data.store import Shard, Store, collect, scan_shards
from ple_train.batches import Sequence
from ple_train.log import print_to_log
from schemas.errors import UsageError

WINDOW_ROWS = 16_384
ID_COLUMNS = ["x_ids", "y_ids", "y_prompt_ids"]
COLUMNS = ["query_id", "round", "s", "s_prompt", *ID_COLUMNS]
ARMS = ("y", "y_prompt")


@dataclass(frozen=True)
class Response:
    """What the PLE objective knows of a sequence: its arm, its pair's set and age in rounds, and its coefficient."""

    arm: str
    set: str
    age: int
    coefficient: float


@dataclass(frozen=True)
class Partition:
    """How rows become coefficients: tau_t of this round and the options of `ple_data.partition.partition`."""

    tau: float
    normalize_wsft: bool = False
    sft_anchor: float = 0.0
    without: Without | None = None

    def expressions(self) -> list[pl.Expr]:
        """Columns set, c and c_prompt (and the rest of the partition)."""
        return partition(self.tau, normalize_wsft=self.normalize_wsft, anchor=self.sft_anchor, without=self.without)


@dataclass(frozen=True)
class SnapshotShard:
    """A committed shard of a frozen snapshot, and how many of its rows fit `max_length`."""

    store: Path
    shard: Shard
    rows: int


class PairStream:
    """Global batches of `batch_size` pairs (two sequences each); the last of an epoch is short, never dropped.

    In an ablation (`Partition.without`) responses with the coefficient 0 stay out: they would cost and teach nothing.
    """

    def __init__(
        self,
        snapshot: list[SnapshotShard],
        round: int,
        partition: Partition,
        *,
        batch_size: int,
        seed: int,
        max_length: int | None,
        vocabulary: int,
        positions: int | None = None,
        window_rows: int = WINDOW_ROWS,
    ) -> None:
        self.snapshot, self.round, self.partition = snapshot, round, partition
        self.batch_size, self.seed, self.max_length = batch_size, seed, max_length
        self.vocabulary, self.positions, self.window_rows = vocabulary, positions, window_rows
        self.pairs = sum(s.rows for s in snapshot)
        self.steps_per_epoch = -(-self.pairs // batch_size)

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
                frames = [read_rows(part, COLUMNS, self.max_length) for part in window]
                yield pl.concat(frames)[shuffle].with_columns(self.partition.expressions())
            skip = max(0, skip - rows)
            window, number = [], number + 1

    def _sequences(self, rows: pl.DataFrame) -> tuple[list[Sequence], int]:
        sequences = []
        for number, row in enumerate(rows.iter_rows(named=True)):
            for arm, coefficient in zip(ARMS, (row["c"], row["c_prompt"]), strict=True):
                if self.partition.without and coefficient == 0:
                    continue
                ids = np.array(row["x_ids"] + row[f"{arm}_ids"], dtype=np.int32)
                refuse_foreign_ids(ids, f"query {row['query_id']!r} of round {row['round']}: x and {arm}", self)
                tag = Response(arm, row["set"], self.round - row["round"], coefficient)
                sequence = Sequence(ids, len(row["x_ids"]), tag, query=number)
                if sequence.response > 0:
                    sequences.append(sequence)
        return sequences, rows.height


class Limits(Protocol):
    """What a model can take: token ids below `vocabulary`, and at most `positions` of them where it has a limit."""

    vocabulary: int
    positions: int | None


def refuse_foreign_ids(ids: np.ndarray, what: str, limits: Limits) -> None:
    """Raise UsageError where stored ids [n] are not the model's, or more than it has positions; `what` names them."""
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


def refuse_unfit_pairs(parts: list[SnapshotShard], limits: Limits, max_length: int | None, policy: str) -> None:
    """Raise UsageError where a pair that will be trained on is not for the model: see `refuse_foreign_ids`.

    So that no training stops at such a pair after hours, the token ids of all rounds are read once; but not of rounds
    that were begun with this very base model (`policy` is a name with digests), of which ple-gen has seen to it. What
    was put among its files by hand is refused when its turn comes.
    """
    bases = {key: _base_of_round(*key) for key in {(p.store, p.shard.round) for p in parts}}
    foreign = [p.shard for p in parts if bases[p.store, p.shard.round] != _base(policy)]
    rows = scan_shards("pairs", foreign)
    rows = rows if max_length is None else rows.filter(fits(max_length))
    unfit = pl.any_horizontal(pl.col(name).list.max() >= limits.vocabulary for name in ID_COLUMNS)
    if limits.positions is not None:
        unfit |= ~fits(limits.positions)
    columns = ["query_id", "round", *ID_COLUMNS]
    for row in collect(rows.filter(unfit).head(1).select(columns)).iter_rows(named=True):
        for arm in ARMS:
            ids = np.array(row["x_ids"] + row[f"{arm}_ids"])
            refuse_foreign_ids(ids, f"query {row['query_id']!r} of round {row['round']}: x and {arm}", limits)


def _base_of_round(root: Path, round: int) -> str | None:
    manifest = Store(root).load_manifest(round)
    return _base(str(manifest.settings.get("policy"))) if manifest else None


def _base(policy: str) -> str:
    return digests_of(policy).partition("+")[0]


def warn_of_unfinished_rounds(parts: list[SnapshotShard]) -> None:
    """Say on stderr where a store holds fewer pairs of a round than its sampling was asked for."""
    for root in dict.fromkeys(part.store for part in parts):
        for round, rows, asked in Store(root).unfinished(part.shard for part in parts if part.store == root):
            print_to_log(
                f"warning: round {round} of {root} has {rows} of its {asked} pairs: ple-gen or ple-score has not come "
                "to its end, and what it adds later is not trained on"
            )


def warn_of_another_sampler(parts: list[SnapshotShard], round: int, policy: str) -> None:
    """Say on stderr where round `round` was not sampled by `policy` (its name with digests), which is to be trained."""
    newest = {part.store: part.shard for part in parts if part.shard.round == round}
    for root, shard in newest.items():
        sampler = Store(root).provenance(shard).get("policy")
        if sampler and digests_of(sampler) != digests_of(policy):
            print_to_log(
                f"warning: round {round} of {root} was sampled by {sampler}, but training starts from {policy}; PLE "
                "goes on with the policy that sampled the newest round: is --adapter missing, or of another round?"
            )


def read_rows(part: SnapshotShard, columns: list[str], max_length: int | None) -> pl.DataFrame:
    """The rows of a shard that fit `max_length`, in the stored order; columns must hold the ids of x and both arms."""
    frame = pl.DataFrame(pl.from_arrow(Store(part.store).read(part.shard, columns=columns)))
    return frame if max_length is None else frame.filter(fits(max_length))


def sampled_by_round(snapshot: list[SnapshotShard], columns: tuple[str, ...]) -> dict[int, int]:
    """Ids in the list columns `columns` by round: of every row of the shards, whether it fits `max_length` or not."""
    lengths = [pl.col(name).list.len().cast(pl.Int64) for name in columns]
    tokens = pl.sum_horizontal(pl.lit(0, pl.Int64), *lengths).sum()
    rows = scan_shards("pairs", [part.shard for part in snapshot])
    return dict(collect(rows.group_by("round").agg(tokens.alias("tokens"))).select("round", "tokens").iter_rows())


def fits(max_length: int) -> pl.Expr:
    """Whether x with either response is at most `max_length` ids long."""
    longest = pl.max_horizontal(pl.col("y_ids").list.len(), pl.col("y_prompt_ids").list.len())
    return pl.col("x_ids").list.len() + longest <= max_length


def freeze(data: list[Path], round: int, max_length: int | None, first: int = 0) -> list[SnapshotShard]:
    """The snapshot to train on: every committed pairs shard of rounds `first` to `round` of all stores.

    Raises UsageError where one of these rounds has no pairs in any of them.
    """
    parts = []
    for root in data:
        store = Store(root)
        for shard in store.shards("pairs", max_round=round):
            if shard.round < first:
                continue
            rows = shard.rows
            if max_length is not None:
                lengths = pl.DataFrame(pl.from_arrow(store.read(shard, columns=ID_COLUMNS)))
                rows = lengths.filter(fits(max_length)).height
            parts.append(SnapshotShard(Path(root), shard, rows))
    present = {part.shard.round for part in parts}
    missing = [t for t in range(first, round + 1) if t not in present]
    if missing:
        names = ", ".join(str(path) for path in data)
        raise UsageError(
            f"no pairs of round {missing[0]} in {names}: generate and score it first "
            f"(ple-gen --round {missing[0]} --reward-model R, or ple-score)"
        )
    if not any(part.rows for part in parts):
        raise UsageError(f"every pair is longer than --max-length {max_length}: nothing to train on")
    return parts


def refuse_doubled_pairs(data: list[Path], round: int, first: int = 0) -> None:
    """Raise UsageError where all pairs of rounds `first` to `round` of a store stand in another, and warn where some
    do: they count twice.

    A pair is the same where policy, query and all token ids are: a copy of a store, the store of another reward model,
    rows that were reused. Keeps eight bytes a pair.
    """
    if len(data) < 2:
        return
    key = pl.struct("policy", "query_id", "sample", "y_ids", "y_prompt_ids").hash().unique().alias("key")
    rows = [Store(root).scan("pairs", max_round=round).filter(pl.col("round") >= first) for root in data]
    keys = [collect(frame.select(key))["key"] for frame in rows]
    for first, second in itertools.combinations(range(len(data)), 2):
        shared = int(keys[first].is_in(keys[second].implode()).sum())
        what = f"{shared} pairs of --data {data[first]} stand in --data {data[second]} too, and would count twice"
        if shared and shared == min(len(keys[first]), len(keys[second])):
            raise UsageError(f"{what}: it is a copy, or was scored by another reward model; give one of the two")
        if shared:
            print_to_log(f"warning: {what}")


def snapshot_record(parts: list[SnapshotShard]) -> list[dict[str, Any]]:
    """The snapshot as JSON: which shards, with their hashes."""
    return [
        {
            "store": str(p.store),
            "round": p.shard.round,
            "unit": p.shard.unit,
            "sha256": p.shard.sha256,
            "rows": p.rows,
        }
        for p in parts
    ]


def thaw(record: list[dict[str, Any]]) -> list[SnapshotShard]:
    """The snapshot that `snapshot_record` froze. Raises UsageError where one of its shards is gone or changed."""
    found: dict[tuple[str, int, str], Shard] = {}
    for root in sorted({part["store"] for part in record}):
        found |= {(root, s.round, s.unit): s for s in Store(root).shards("pairs")}
    parts = []
    for part in record:
        shard = found.get((part["store"], part["round"], part["unit"]))
        if shard is None or shard.sha256 != part["sha256"]:
            raise UsageError(
                f"{part['store']}: shard {part['unit']} of round {part['round']} is gone or changed since this "
                "training began; put it back, or start again with --no-resume"
            )
        parts.append(SnapshotShard(Path(part["store"]), shard, part["rows"]))
    return parts
