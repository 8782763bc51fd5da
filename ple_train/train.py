"""`ple-train`: one round of PLE training. All pairs up to round T in, the next policy's LoRA adapter out (Algorithm 1).

Reads committed pairs and a model; never samples and never scores.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl

from ple_data.digests import policy_name
from ple_data.models import AdapterInfo, check_adapter, check_model, load_tokenizer
from ple_data.partition import Without, rank_shares, round_statistics, tau
from ple_data.partition import warnings as partition_warnings
from ple_data.store import Store, collect, scan_shards
from ple_train.checkpoint import refuse_other_settings
from ple_train.cost import training_cost
from ple_train.log import print_to_log
from ple_train.loop import LoopSettings, make_accelerator, train_loop
from ple_train.objective import PairObjective
from ple_train.output import Output
from ple_train.pairs import (
    PairStream,
    Partition,
    SnapshotShard,
    fits,
    freeze,
    refuse_doubled_pairs,
    refuse_unfit_pairs,
    sampled_by_round,
    snapshot_record,
    thaw,
    warn_of_another_sampler,
    warn_of_unfinished_rounds,
)
from ple_train.policy import load_policy, resolve_precision
from schemas.errors import UsageError
from schemas.files import write_atomic

LEARNING_RATE = 1e-4


def train(
    *,
    model: str,
    data: list[Path],
    round: int,
    output: Path,
    adapter: str | None = None,
    revision: str | None = None,
    tau0: float = 0.2,
    alpha: float = 0.9,
    lora_rank: int = 8,
    lora_alpha: int = 16,
    full: bool = False,
    learning_rate: float = LEARNING_RATE,
    epochs: int = 1,
    batch_size: int = 16,
    max_length: int | None = None,
    trust_region: float | None = None,
    normalize_wsft: bool = False,
    sft_anchor: float = 0.0,
    without: Without | None = None,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    resume: bool = True,
    precision: str = "auto",
    attention: str = "auto",
    gradient_checkpointing: bool = False,
    microbatch_tokens: int = 8192,
    checkpoint_every: int = 100,
    metrics: Path | None = None,
    report_to: str | None = None,
) -> None:
    """Train on all pairs of rounds ≤ `round` in all `data` by Eq. 6 at tau_t = tau0 * alpha^round; write `output`.

    `adapter` is the policy to go on from (the one that generated this round); without it a fresh adapter starts
    from `model` itself. Pairs longer than `max_length` ids with x are left out, and counted on stderr. `batch_size`
    is in pairs and global, whatever the number of processes. Safeguards that are not in the paper, off by default:
    `trust_region` (nats/token), `normalize_wsft`, `sft_anchor`. `without` leaves one term of Eq. 6 out (Tables 4, 5).
    Raises UsageError, DamagedError (a shard), LockedError (another process writes `output`), PleError (NaN).
    """
    settings: dict[str, Any] = dict(locals())
    for name in ("output", "resume", "checkpoint_every", "metrics", "report_to"):
        del settings[name]
    check_model(model)
    if adapter:
        refuse_other_lora(check_adapter(adapter, model), lora_rank, lora_alpha)
    settings["data"] = [str(path) for path in data]
    settings["weights"] = policy_name(model, adapter, revision)
    refuse_doubled_stores(data)
    part = Partition(tau(tau0, alpha, round), normalize_wsft, sft_anchor, without)
    if trust_region is not None and full:
        raise UsageError(
            "--trust-region needs the start policy at hand: the model with its adapter off, so not with --full"
        )

    accelerator = make_accelerator(report_to, Path(output))
    with Output(output, "ple", settings, accelerator, resume=resume, metrics=metrics) as out:
        if out.finished:
            note_later_pairs(out, data, round)
            return
        snapshot = frozen_snapshot(out, data, round, max_length)
        if accelerator.is_main_process:
            warn_of_another_sampler(snapshot, round, settings["weights"])
            print_partition(snapshot, round, tau0, alpha, max_length, without)
        tokenizer = load_tokenizer(model, revision, note=print_to_log)
        policy = load_policy(
            model,
            adapter=adapter,
            revision=revision,
            full=full,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            precision=precision,
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
            seed=seed,
        )
        stream = PairStream(
            snapshot,
            round,
            part,
            batch_size=batch_size,
            seed=seed,
            max_length=max_length,
            vocabulary=policy.vocabulary,
            positions=policy.positions,
        )
        if not out.checkpoints.newest():
            refuse_unfit_pairs(snapshot, policy, max_length, settings["weights"])
        out.note_machine(resolve_precision(precision), attention=policy.attention, layout=policy.layout)
        loop = LoopSettings(
            learning_rate=learning_rate,
            epochs=epochs,
            seed=seed,
            precision=resolve_precision(precision),
            microbatch_tokens=microbatch_tokens,
            max_grad_norm=max_grad_norm,
            checkpoint_every=checkpoint_every,
        )
        objective = PairObjective(policy, trust_region)
        history = train_loop(
            accelerator, policy, policy.trainable(), stream, objective, loop, out.checkpoints, out.report
        )
        sampled = sampled_by_round(snapshot, ("y_ids", "y_prompt_ids"))
        cost = training_cost(history, sampled=sampled.pop(round, 0), reused=sum(sampled.values()))
        title = f"{Path(model).name}, PLE round {round}" + (f" without {without}" if without else "")
        out.finish(policy.model, tokenizer, history, title=title, cost=cost)


def refuse_doubled_stores(data: list[Path]) -> None:
    """Raise UsageError where a store is given twice: its pairs would count twice."""
    resolved = [Path(path).resolve() for path in data]
    for path, place in zip(data, resolved, strict=True):
        if resolved.count(place) > 1:
            raise UsageError(f"--data {path} is given more than once; give each store once")


def refuse_other_lora(adapter: AdapterInfo, rank: int, alpha: float) -> None:
    """Raise UsageError where --lora-rank or --lora-alpha contradict the adapter that training goes on from."""
    own = (adapter.rank, adapter.config["lora_alpha"])
    if own != (rank, alpha):
        raise UsageError(
            f"--adapter {adapter.path} has rank {own[0]} and alpha {own[1]}, --lora-rank is {rank} and --lora-alpha "
            f"{alpha}; training goes on with the adapter's own: give those"
        )


def dry_run(data: list[Path], round: int, tau0: float, alpha: float, max_length: int | None) -> str:
    """What training would see, by round, at this round's threshold: a table to print, with warnings."""
    from ple_data.inspect import format_statistics

    tau(tau0, alpha, round)
    refuse_doubled_stores(data)
    warn_of_unfinished_rounds(freeze(data, round, max_length))
    refuse_doubled_pairs(data, round)
    return format_statistics(statistics(data, round, tau0, alpha, max_length), tau0=tau0, alpha=alpha, at_round=round)


def statistics(data: list[Path], round: int, tau0: float, alpha: float, max_length: int | None) -> Any:
    """`round_statistics` over the rounds ≤ `round` of all stores, at this round's tau (a polars DataFrame)."""
    return round_statistics(trained_rows(data, round, max_length), tau0, alpha, at_round=round)


def trained_rows(data: list[Path], round: int, max_length: int | None) -> pl.LazyFrame:
    """The pairs of the rounds ≤ `round` of all stores that fit `max_length`."""
    rows = pl.concat([Store(path).scan("pairs", max_round=round) for path in data])
    return rows if max_length is None else rows.filter(fits(max_length))


def print_partition(
    snapshot: list[SnapshotShard],
    round: int,
    tau0: float,
    alpha: float,
    max_length: int | None,
    without: Without | None = None,
) -> None:
    """Say on stderr what is trained on, and warn where all pairs of a round fall into the rank set, or none do."""
    whole, threshold = scan_shards("pairs", [part.shard for part in snapshot]), tau(tau0, alpha, round)
    rows = whole if max_length is None else whole.filter(fits(max_length))
    shares = rank_shares(rows, threshold)
    rounds = f"{shares.height} round{'s' if shares.height > 1 else ''}"
    print_to_log(f"{shares['rows'].sum()} pairs of {rounds}, tau_{round} = {threshold:.4g}")
    if without == "rank":
        print_to_log("ablation without rank: every pair is weighted SFT")
        note_principle(whole)
        return
    if without == "wsft":
        print_to_log("ablation without wsft: pairs outside the rank set are left out")
    one_sided = shares.filter(pl.col("rank_share").is_in([0.0, 1.0]))["round"].to_list()
    if one_sided:
        these = rows.filter(pl.col("round").is_in(one_sided))
        for warning in partition_warnings(round_statistics(these, tau0, alpha, at_round=round)):
            print_to_log(f"warning: {warning}")


def note_principle(rows: pl.LazyFrame) -> None:
    """Say on stderr where y_prompt was sampled with a principle, for a method that has plain responses alone."""
    guided = collect(rows.select((pl.col("principle") != "").sum())).item()
    if guided:
        print_to_log(
            f"note: {guided} rows have a y_prompt that was sampled with a principle; this method has plain responses "
            "alone in its paper: ple-gen --principles none"
        )


def frozen_snapshot(
    out: Output, data: list[Path], round: int, max_length: int | None, first: int = 0
) -> list[SnapshotShard]:
    """The shards of rounds `first` to `round` that this training sees: frozen when it first started, the same after
    every restart.
    """
    path = out.private / "snapshot.json"
    frozen, snapshot = read_snapshot(path) if out.resume else None, None
    if frozen is not None:
        refuse_other_settings(out.settings, frozen["settings"], out.directory)
    elif out.accelerator.is_main_process:
        snapshot = freeze(data, round, max_length, first)
        refuse_doubled_pairs(data, round, first)
        warn_of_unfinished_rounds(snapshot)
        left_out = sum(part.shard.rows - part.rows for part in snapshot)
        if left_out:
            print_to_log(f"{left_out} pairs left out: longer than --max-length {max_length}")
        frozen = {"version": 1, "settings": out.settings, "shards": snapshot_record(snapshot)}
        write_atomic(path, json.dumps(frozen, indent=1))
    out.accelerator.wait_for_everyone()
    return snapshot or thaw(json.loads(path.read_text())["shards"])


def note_later_pairs(out: Output, data: list[Path], round: int, first: int = 0) -> None:
    """Say on stderr where the stores hold pairs that a finished training has not seen."""
    frozen = read_snapshot(out.private / "snapshot.json")
    if frozen is None or not out.accelerator.is_main_process:
        return
    seen = {(part["store"], part["round"], part["unit"]) for part in frozen["shards"]}
    shards = [(root, shard) for root in data for shard in Store(root).shards("pairs", max_round=round)]
    later = [s for root, s in shards if s.round >= first and (str(root), s.round, s.unit) not in seen]
    if later:
        print_to_log(
            f"note: {sum(shard.rows for shard in later)} pairs have come since it began; to train on them too, give "
            "another --output, or --no-resume"
        )


def read_snapshot(path: Path) -> dict[str, Any] | None:
    """The snapshot that an earlier start froze, if there was one."""
    return json.loads(path.read_text()) if path.exists() else None
