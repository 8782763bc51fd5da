"""`ple-train`: one round of PLE training. All pairs up to round T in, the next policy's LoRA adapter out (Algorithm 1).

Reads committed pairs and a model; never samples and never scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from ple_data.partition import rank_shares, round_statistics, tau
from ple_data.partition import warnings as partition_warnings
from ple_data.storage.store import Store, collect, scan_shards
from ple_train.engine.cost import training_cost
from ple_train.engine.session import Session
from ple_train.log import print_to_log
from ple_train.objectives.pairs import PairObjective
from ple_train.snapshot import (
    SnapshotShard,
    check_finished,
    fits,
    freeze,
    frozen_snapshot,
    refuse_doubled_pairs,
    refuse_doubled_stores,
    sampled_by_round,
    warn_of_another_sampler,
    warn_of_unfinished_rounds,
)
from ple_train.stream import PairStream, Partition, refuse_unfit_pairs
from schemas.errors import UsageError
from schemas.options import Train


def train(options: Train) -> None:
    """Train on all pairs of rounds ≤ `round` in all `data` by Eq. 6 at tau_t = tau0 * alpha^round; write `output`.

    `adapter` is the policy to go on from (the one that generated this round); without it a fresh adapter starts from
    `model` itself. `batch_size` is in pairs and global, whatever the number of processes. Raises UsageError,
    DamagedError (a shard), LockedError (another process writes `output`), PleError (NaN).
    """
    refuse_doubled_stores(options.data)
    part = Partition.of(options)
    if options.trust_region is not None and options.full:
        raise UsageError(
            "--trust-region needs the start policy at hand: the model with its adapter off, so not with --full"
        )
    with Session("ple", options, elsewhere=["data"]) as session:
        if session.finished:
            check_finished(session.out, options.data, options.round)
            return
        snapshot = frozen_snapshot(session.out, options.data, options.round, options.max_length)
        if session.accelerator.is_main_process:
            warn_of_another_sampler(snapshot, options.round, session.weights)
            print_partition(snapshot, options)
        session.load_tokenizer()
        policy = session.load_policy()
        if not session.out.checkpoints.newest():
            refuse_unfit_pairs(snapshot, policy, options.max_length, session.weights)
        stream = PairStream(snapshot, part, options, policy)
        history = session.fit(policy, stream, PairObjective(policy, options.trust_region))
        sampled = sampled_by_round(snapshot, ("y_ids", "y_prompt_ids"))
        cost = training_cost(history, sampled=sampled.pop(options.round, 0), reused=sum(sampled.values()))
        what = f"PLE round {options.round}" + (f" without {options.without}" if options.without else "")
        session.finish(policy.model, history, what, cost=cost)


def dry_run(options: Train) -> str:
    """What training would see, by round, at this round's threshold: a table to print, with warnings."""
    from ple_data.inspection import format_statistics

    refuse_doubled_stores(options.data)
    warn_of_unfinished_rounds(freeze(options.data, options.round, options.max_length))
    refuse_doubled_pairs(options.data, options.round)
    found = statistics(options)
    return format_statistics(found, tau0=options.tau0, alpha=options.alpha, at_round=options.round)


def statistics(options: Train) -> Any:
    """`round_statistics` over the rounds ≤ `round` of all stores, at this round's tau (a polars DataFrame)."""
    rows = trained_rows(options.data, options.round, options.max_length)
    return round_statistics(rows, options.tau0, options.alpha, at_round=options.round)


def trained_rows(data: Sequence[Path], round: int, max_length: int | None) -> pl.LazyFrame:
    """The pairs of the rounds ≤ `round` of all stores that fit `max_length`."""
    rows = pl.concat([Store(path).scan("pairs", max_round=round) for path in data])
    return rows if max_length is None else rows.filter(fits(max_length))


def print_partition(snapshot: list[SnapshotShard], options: Train) -> None:
    """Say on stderr what is trained on, and warn where all pairs of a round fall into the rank set, or none do."""
    whole = scan_shards("pairs", [part.shard for part in snapshot])
    threshold = tau(options.tau0, options.alpha, options.round)
    rows = whole if options.max_length is None else whole.filter(fits(options.max_length))
    shares = rank_shares(rows, threshold)
    rounds = f"{shares.height} round{'s' if shares.height > 1 else ''}"
    print_to_log(f"{shares['rows'].sum()} pairs of {rounds}, tau_{options.round} = {threshold:.4g}")
    if options.without == "rank":
        print_to_log("ablation without rank: every pair is weighted SFT")
        note_principle(whole)
        return
    if options.without == "wsft":
        print_to_log("ablation without wsft: pairs outside the rank set are left out")
    one_sided = shares.filter(pl.col("rank_share").is_in([0.0, 1.0]))["round"].to_list()
    if one_sided:
        these = rows.filter(pl.col("round").is_in(one_sided))
        found = round_statistics(these, options.tau0, options.alpha, at_round=options.round)
        for warning in partition_warnings(found):
            print_to_log(f"warning: {warning}")


def note_principle(rows: pl.LazyFrame) -> None:
    """Say on stderr where y_prompt was sampled with a principle, for a method that has plain responses alone."""
    guided = collect(rows.select((pl.col("principle") != "").sum())).item()
    if guided:
        print_to_log(
            f"note: {guided} rows have a y_prompt that was sampled with a principle; this method has plain responses "
            "alone in its paper: ple-gen --principles none"
        )
