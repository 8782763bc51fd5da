"""`ple baseline dpo`: Direct Preference Optimization on the pairs of a store, the response with the higher reward
chosen.

On our own loop it is `ple-train --objective dpo`. By TRL's DPOTrainer the token ids are the stored ones: its own
tokenising is left out, so nothing drifts. The reference is the start policy, that is the model with its adapter off, in
every round. Never samples. A run of TRL that is killed starts over: its checkpoints are pickles, which this project
does not read.
"""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl

from ple_data import selection
from ple_data.common.models import pad_id, positions_of
from ple_data.common.progress import Progress
from ple_train import snapshot as snapshots
from ple_train.baselines import trl_tools
from ple_train.baselines.responses import CHOSEN_FROM
from ple_train.engine.checkpoint import History
from ple_train.engine.output import SNAPSHOT, START_AGAIN, read_record
from ple_train.engine.session import Session
from ple_train.log import print_to_log
from ple_train.stream import checked_ids
from ple_train.train import train
from schemas import records
from schemas.errors import UsageError
from schemas.options import Dpo, Train
from schemas.training import Snapshot

IDS = {"x_ids": "prompt_ids", "chosen_ids": "chosen_ids", "rejected_ids": "rejected_ids"}
"""Columns of token ids, and TRL's names of them."""


def dpo(options: Dpo) -> None:
    """Direct Preference Optimization (Rafailov et al. 2023) on the pairs of all rounds ≤ `round`; writes `output`.

    Pairs with equal rewards teach nothing. `batch_size` is in pairs. `beta` scales the log-ratio to the start policy.
    Raises UsageError, DamagedError (a shard), LockedError, PleError (NaN).
    """
    if options.via == "trl" or (options.via is None and options.resume and made_by_trl(options.output)):
        via_trl(options)
        return
    shared = {known.name for known in fields(Train)} & {known.name for known in fields(Dpo)}
    train(Train(objective="dpo", **{name: getattr(options, name) for name in shared}))


def made_by_trl(output: Path) -> bool:
    """Whether TRL has finished or begun this output. Raises DamagedError."""
    record, begun = read_record(output), output / ".ple" / SNAPSHOT
    found = records.read_record(Snapshot, begun, START_AGAIN) if record is None and begun.exists() else record
    return found is not None and found.settings.get("method") == "dpo"


def via_trl(options: Dpo) -> None:
    """By TRL's trainer: ties are left out, and counted on stderr."""
    version = trl_tools.require_trl("dpo")
    snapshots.refuse_doubled_stores(options.data)
    with Session("baseline", options, more={"method": "dpo", "trl": version}, elsewhere=["data"]) as session:
        trl_tools.refuse_many_processes(session.accelerator)
        if session.finished:
            snapshots.check_finished(session, options.data, options.round)
            return
        snapshot = snapshots.frozen_snapshot(session, options.data, options.round, options.max_length)
        frames = (snapshots.read_rows(part, CHOSEN_FROM, options.max_length) for part in snapshot)
        pairs = pl.concat([selection.preferences(frame) for frame in frames])
        ties = sum(part.rows for part in snapshot) - pairs.height
        if not pairs.height:
            raise UsageError(f"all {ties} pairs of --data have equal rewards: there is nothing to prefer")
        print_to_log(f"dpo: {pairs.height} pairs; {ties} left out, their rewards are equal")
        tokenizer, policy = session.load_tokenizer(), session.load_causal_lm()
        vocabulary = policy.get_output_embeddings().weight.shape[0]
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id(tokenizer, vocabulary))
        limits = SimpleNamespace(vocabulary=vocabulary, positions=positions_of(policy.config))
        for row in pairs.select("query_id", "round", *IDS).iter_rows(named=True):
            for column in ("chosen_ids", "rejected_ids"):
                checked_ids(row, column, "response", limits)
        scratch = session.private / "trl"
        with trl_tools.quiet_trl():
            history = _train(policy, pairs, tokenizer, options, trl_tools.training_arguments(scratch, options))
        shutil.rmtree(scratch, ignore_errors=True)
        trained = pairs.select(pl.sum_horizontal(pl.col("chosen_ids", "rejected_ids").list.len()).sum()).item()
        sampled = snapshots.sampled_by_round(snapshot, ("y_ids", "y_prompt_ids"))
        what = f"dpo, round {options.round}"
        session.finish(policy, history, what, sampled=sampled, trained=options.epochs * trained)


def _train(policy: Any, pairs: pl.DataFrame, tokenizer: Any, options: Dpo, arguments: dict[str, Any]) -> History:
    """Run TRL's trainer over the stored ids, in place → metrics of every step."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class IdsTrainer(DPOTrainer):
        """DPOTrainer on token ids: it would decode and tokenise, and add an end to responses that were cut."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    responses = pl.max_horizontal(pl.col("chosen_ids", "rejected_ids").list.len())
    longest = pairs.select((pl.col("x_ids").list.len() + responses).max()).item()
    arguments |= {"num_train_epochs": options.epochs, "gradient_checkpointing": options.gradient_checkpointing}
    arguments |= trl_tools.micro_batching(options.batch_size, options.microbatch_tokens // (2 * longest))
    config = DPOConfig(**arguments, beta=options.beta, max_length=None)
    trainer = IdsTrainer(
        model=trl_tools.with_float32_logits(policy),
        args=trl_tools.one_device(config),
        train_dataset=Dataset.from_polars(pairs.select(IDS.keys()).rename(IDS)),
        processing_class=tokenizer,
    )
    if "ref" in policy.peft_config:
        policy.delete_adapter("ref")  # TRL's reference would be this round's start; without it, the adapter is off
    steps = options.epochs * -(-pairs.height // options.batch_size)
    return trl_tools.run_trainer(trainer, Progress("training", steps, "steps"))
