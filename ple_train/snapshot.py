"""Which shards a training sees: frozen when it first starts, the same after every restart, wherever the stores lie."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ple_data.common.digests import digests_of
from ple_data.common.settings import as_json
from ple_data.storage.store import Shard, Store, collect, scan_shards
from ple_train.engine.output import SNAPSHOT, START_AGAIN, Output
from ple_train.log import print_to_log
from schemas.errors import UsageError
from schemas.files import write_atomic
from schemas.records import read_record
from schemas.training import Snapshot, SnapshotPart

ID_COLUMNS = ["x_ids", "y_ids", "y_prompt_ids"]


@dataclass(frozen=True)
class SnapshotShard:
    """A committed shard of a frozen snapshot, and how many of its rows fit `max_length`."""

    store: Path
    shard: Shard
    rows: int


def frozen_snapshot(
    out: Output, data: Sequence[Path], round: int, max_length: int | None, first: int = 0
) -> list[SnapshotShard]:
    """The shards of rounds `first` to `round` of the stores `data` that this training sees.

    Raises UsageError where a round has no pairs, or where the stores lack what an earlier start has frozen.
    """
    path = out.private / SNAPSHOT
    if out.resume and path.exists():
        frozen = read_record(Snapshot, path, START_AGAIN)
        out.settings.refuse_other(frozen.settings, out.directory)
        snapshot = thaw(frozen, data)
    elif out.accelerator.is_main_process:
        snapshot = freeze(data, round, max_length, first)
        left_out = sum(part.shard.rows - part.rows for part in snapshot)
        if left_out:
            print_to_log(f"{left_out} pairs left out: longer than --max-length {max_length}")
        write_atomic(path, record_of(snapshot, out.settings.values).to_json())
    out.accelerator.wait_for_everyone()
    return snapshot if out.accelerator.is_main_process else thaw(read_record(Snapshot, path, START_AGAIN), data)


def record_of(snapshot: list[SnapshotShard], settings: dict[str, Any]) -> Snapshot:
    """The snapshot as it is kept: which shards, with their hashes."""
    parts = [
        SnapshotPart(store=str(p.store), round=p.shard.round, unit=p.shard.unit, sha256=p.shard.sha256, rows=p.rows)
        for p in snapshot
    ]
    return Snapshot(settings=settings, shards=parts)


def thaw(frozen: Snapshot, data: Sequence[Path]) -> list[SnapshotShard]:
    """The frozen shards, by their hashes, in the stores `data`. Raises UsageError where one is gone or changed."""
    found = {(s.round, s.unit, s.sha256): (root, s) for root in data for s in Store(root).shards("pairs")}
    parts = []
    for part in frozen.shards:
        key = (part.round, part.unit, part.sha256)
        if key not in found:
            raise UsageError(
                f"--data {', '.join(map(str, data))}: shard {part.unit} of round {part.round} is gone or changed since "
                "this training began; put it back, use another --output, or start again with --no-resume"
            )
        root, shard = found[key]
        parts.append(SnapshotShard(Path(root), shard, part.rows))
    rounds, used = {part.round for part in frozen.shards}, {part.store for part in parts}
    begun_with = as_json(frozen.settings.get("data") or [])
    for root in data:
        known = root in used or str(root) in begun_with
        if not known and any(shard.round in rounds for shard in Store(root).shards("pairs")):
            raise UsageError(
                f"--data {root} was not there when this training began; leave it out, use another --output, or start "
                "again with --no-resume"
            )
    return parts


def check_finished(out: Output, data: Sequence[Path], round: int, first: int = 0) -> None:
    """Raise UsageError where a finished training saw other stores, and say where they hold pairs that came later."""
    path = out.private / SNAPSHOT
    if not out.accelerator.is_main_process:
        return
    if not path.exists():  # the output was copied without it: then the names of the stores must do
        out.settings.with_all().refuse_other(out.found, out.directory)
        return
    frozen = read_record(Snapshot, path, START_AGAIN)
    if [str(path) for path in data] != frozen.settings.get("data"):
        thaw(frozen, data)
    seen = {(part.round, part.unit, part.sha256) for part in frozen.shards}
    shards = [shard for root in data for shard in Store(root).shards("pairs", max_round=round)]
    later = [s for s in shards if s.round >= first and (s.round, s.unit, s.sha256) not in seen]
    if later:
        print_to_log(
            f"note: {sum(shard.rows for shard in later)} pairs have come since it began; to train on them too, give "
            "another --output, or --no-resume"
        )


def refuse_doubled_stores(data: Sequence[Path]) -> None:
    """Raise UsageError where a store is given twice: its pairs would count twice."""
    resolved = [path.resolve() for path in data]
    for path, place in zip(data, resolved, strict=True):
        if resolved.count(place) > 1:
            raise UsageError(f"--data {path} is given more than once; give each store once")


def freeze(data: Sequence[Path], round: int, max_length: int | None, first: int = 0) -> list[SnapshotShard]:
    """The snapshot to train on: every committed pairs shard of rounds `first` to `round` of all stores.

    Raises UsageError where one of these rounds has no pairs in any of them, or where a store is a copy of another.
    Says on stderr where a round is not finished.
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
    missing = next((t for t in range(first, round + 1) if t not in present), None)
    if missing is not None:
        names = ", ".join(str(path) for path in data)
        raise UsageError(
            f"no pairs of round {missing} in {names}: generate and score it first "
            f"(ple-gen --round {missing} --reward-model R, or ple-score)"
        )
    if not any(part.rows for part in parts):
        raise UsageError(f"every pair is longer than --max-length {max_length}: nothing to train on")
    _refuse_doubled_pairs(data, round, first)
    _warn_of_unfinished_rounds(parts)
    return parts


def _refuse_doubled_pairs(data: Sequence[Path], round: int, first: int = 0) -> None:
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


def base_of_round(root: Path, round: int) -> str | None:
    """Digest of the base model with which a round was begun."""
    manifest = Store(root).load_manifest(round)
    return base_of(str(manifest.settings.get("policy"))) if manifest else None


def base_of(policy: str) -> str:
    """Digest of the base model in a policy's name."""
    return digests_of(policy).partition("+")[0]


def _warn_of_unfinished_rounds(parts: list[SnapshotShard]) -> None:
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
                f"warning: round {round} of {root} was sampled by {sampler}, but training starts from {policy}; it "
                "should go on with the policy that sampled the newest round: is --adapter missing, or of another round?"
                " (A recipe with restart: true means it.)"
            )


def read_rows(
    part: SnapshotShard,
    columns: list[str],
    max_length: int | None,
    beside: Callable[[SnapshotShard], pl.DataFrame] | None = None,
) -> pl.DataFrame:
    """The rows of a shard that fit `max_length`, in the stored order; columns must hold the ids of x and both arms.

    beside: gives more columns of all its rows.
    """
    frame = pl.DataFrame(pl.from_arrow(Store(part.store).read(part.shard, columns=columns)))
    if beside is not None:
        frame = frame.hstack(beside(part))
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
