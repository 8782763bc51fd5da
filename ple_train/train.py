"""`ple-train`: one round of PLE training. All pairs up to round T in, the next policy's LoRA adapter out (Algorithm 1).

Reads committed pairs and a model; never samples and never scores.
"""

from __future__ import annotations

import math

import polars as pl

from ple_data.common.digests import policy_name
from ple_data.partition import rank_shares, round_statistics, tau
from ple_data.partition import warnings as partition_warnings
from ple_data.storage.store import Store, collect, scan_shards
from ple_train import snapshot as snapshots
from ple_train.engine.checkpoint import newest_checkpoint
from ple_train.engine.session import Session
from ple_train.log import print_to_log
from ple_train.measure.pair_logps import StartLogps
from ple_train.objectives import make_objective
from ple_train.objectives.pair_loss import Knobs
from ple_train.stream import PairStream, refuse_unfit_pairs
from schemas.errors import UsageError
from schemas.options import OBJECTIVE_KINDS, Train, misfit

STABLE_DELTA = 0.3
"""Nats a token: the trust region of --stable."""


def train(options: Train) -> None:
    """Train on all pairs of rounds ≤ `round` in all `data` by Eq. 6 at tau_t = tau0 * alpha^round; write `output`.

    `adapter` is the policy to go on from (the one that generated this round); without it a fresh adapter starts from
    `model` itself. `batch_size` is in pairs and global, whatever the number of processes. Raises UsageError,
    DamagedError (a shard), LockedError (another process writes `output`), PleError (NaN).
    """
    snapshots.refuse_doubled_stores(options.data)
    options = settled(options)
    kind = OBJECTIVE_KINDS[options.objective]
    needs_start = kind.start or options.trust_region is not None
    with Session("ple", options, elsewhere=["data"]) as session:
        if session.finished:
            snapshots.check_finished(session, options.data, options.round)
            return
        snapshot = snapshots.frozen_snapshot(session, options.data, options.round, options.max_length)
        if session.accelerator.is_main_process:
            snapshots.warn_of_another_sampler(snapshot, options.round, session.weights)
            print_partition(snapshot, options)
        session.load_tokenizer()
        policy = session.load_policy()
        if not newest_checkpoint(session.checkpoints.directory):
            refuse_unfit_pairs(snapshot, policy, options.max_length, session.weights)
        name = policy_name(options.model, None, options.revision)
        start = StartLogps(name, session.options.precision, session.private)
        if needs_start:
            start.fill(policy, snapshot, options.microbatch_tokens, session.accelerator)
        beside = start.of if start.are_kept(snapshot, session.accelerator) else None
        stream = PairStream(snapshot, options, policy, beside=beside, quantiles=kind.quantiles)
        objective = make_objective(
            "pairs", policy, options.trust_region, options.objective, knobs(options), options.form or kind.form
        )
        history = session.fit(policy, stream, objective)
        what = f"PLE round {options.round}" + (f" without {options.without}" if options.without else "")
        if options.objective != "ple":
            what = f"{options.objective}, round {options.round}"
        sampled = snapshots.sampled_by_round(snapshot, ("y_ids", "y_prompt_ids"))
        session.finish(policy.model, history, what, sampled=sampled)


def settled(options: Train) -> Train:
    """The options with what `stable` and an objective's own defaults stand for written out.

    Raises UsageError for options that do not go together.
    """
    if found := misfit(options):
        raise UsageError(found)
    if options.stable:
        delta = STABLE_DELTA if options.trust_region is None else options.trust_region
        options = options.but(stable=False, normalize_wsft=True, trust_region=delta)
    kind = OBJECTIVE_KINDS[options.objective]
    if kind.linear:
        return options
    form = options.form or kind.form
    return options.but(form=form, beta=kind.betas[form] if options.beta is None else options.beta)


def knobs(options: Train) -> Knobs:
    """How the objective is set, of settled options."""
    threshold = math.inf if options.without == "rank" else tau(options.tau0, options.alpha, options.round)
    beta = 1.0 if options.beta is None else options.beta
    return Knobs(threshold, beta, options.label_smoothing, weighted=options.without != "wsft")


def dry_run(options: Train) -> str:
    """What training would see, by round, at this round's threshold: a table to print, with warnings."""
    from ple_data.inspection import format_statistics, rest

    snapshots.refuse_doubled_stores(options.data)
    options = settled(options)
    snapshots.freeze(options.data, options.round, options.max_length)
    found = statistics(options)
    text = format_statistics(found, tau0=options.tau0, alpha=options.alpha, at_round=options.round)
    if options.beta is not None and OBJECTIVE_KINDS[options.objective].stops:
        text += "\n" + rest(found.select("round", "margin_q50").iter_rows(), options.beta)
    return text


def statistics(options: Train) -> pl.DataFrame:
    """`round_statistics` of the pairs of all stores that would be trained on, at this round's tau."""
    rows = pl.concat([Store(path).scan("pairs", max_round=options.round) for path in options.data])
    kept = rows if options.max_length is None else rows.filter(snapshots.fits(options.max_length))
    return round_statistics(kept, options.tau0, options.alpha, at_round=options.round)


def print_partition(snapshot: list[snapshots.SnapshotShard], options: Train) -> None:
    """Say on stderr what is trained on, and warn where all pairs of a round fall into the rank set, or none do."""
    whole = scan_shards("pairs", [part.shard for part in snapshot])
    threshold = tau(options.tau0, options.alpha, options.round)
    rows = whole if options.max_length is None else whole.filter(snapshots.fits(options.max_length))
    shares = rank_shares(rows, threshold)
    rounds = f"{shares.height} round{'s' if shares.height > 1 else ''}"
    has_rank_set = OBJECTIVE_KINDS[options.objective].sets and options.without != "rank"
    what = f", tau_{options.round} = {threshold:.4g}" if has_rank_set else ""
    method = options.objective + (f" without {options.without}" if options.without else "")
    print_to_log(f"{shares['rows'].sum()} pairs of {rounds}{what}, by {method}")
    if options.objective == "ple" and options.without == "rank":
        note_principle(whole)
    if not has_rank_set:
        return
    if options.without == "wsft":
        print_to_log("without wsft: pairs outside the rank set are left out")
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
