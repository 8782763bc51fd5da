"""`ple baseline dpo`: TRL's DPOTrainer on the pairs of a store, the response with the higher reward chosen.

The token ids are the stored ones: TRL's own tokenising is left out, so nothing drifts. The reference is the start
policy, that is the model with its adapter off, in every round. Never samples. A killed run starts over: TRL's
checkpoints are pickles, which this project does not read.
"""

from __future__ import annotations

import shutil
from typing import Any

import polars as pl

from ple_data import selection
from ple_data.common.progress import Progress
from ple_train.baselines.responses import CHOSEN_FROM, title
from ple_train.baselines.trl_tools import (
    largest_divisor,
    one_device,
    quiet_trl,
    refuse_many_processes,
    require_trl,
    steps_callback,
    training_arguments,
    with_float32_logits,
)
from ple_train.engine.cost import training_cost
from ple_train.engine.session import Session
from ple_train.log import print_to_log
from ple_train.snapshot import (
    check_finished,
    frozen_snapshot,
    read_rows,
    refuse_doubled_stores,
    sampled_by_round,
)
from ple_train.stream import refuse_foreign_ids
from schemas.errors import UsageError
from schemas.options import Dpo

IDS = ["x_ids", "chosen_ids", "rejected_ids"]


def dpo(options: Dpo) -> None:
    """Direct Preference Optimization (Rafailov et al. 2023) on the pairs of all rounds ≤ `round`; writes `output`.

    Pairs with equal rewards are left out, and counted on stderr. `batch_size` is in pairs. `beta` scales the
    log-ratio to the start policy. Raises UsageError, DamagedError (a shard), LockedError, PleError (NaN).
    """
    version = require_trl("dpo")
    refuse_doubled_stores(options.data)
    with Session("baseline", options, more={"method": "dpo", "trl": version}, elsewhere=["data"]) as session:
        refuse_many_processes(session.accelerator)
        if session.finished:
            check_finished(session.out, options.data, options.round)
            return
        snapshot = frozen_snapshot(session.out, options.data, options.round, options.max_length)
        frames = [selection.preferences(read_rows(part, CHOSEN_FROM, options.max_length)) for part in snapshot]
        pairs = preference_pairs(frames, snapshot)
        tokenizer, policy = session.load_tokenizer(), session.load_causal_lm()
        refuse_foreign_pairs(pairs, policy)
        scratch = session.out.private / "trl"
        arguments = (
            training_arguments(scratch, options)
            | {"num_train_epochs": options.epochs, "gradient_checkpointing": options.gradient_checkpointing}
            | micro_batching(pairs, options.batch_size, options.microbatch_tokens)
        )
        with quiet_trl():
            history = _train(policy, pairs, tokenizer, beta=options.beta, arguments=arguments)
        shutil.rmtree(scratch, ignore_errors=True)
        sampled = sampled_by_round(snapshot, ("y_ids", "y_prompt_ids"))
        lengths = pairs.select(pl.sum_horizontal(pl.col(name).list.len() for name in IDS[1:]).sum()).item()
        reused = {"sampled": sampled.pop(options.round, 0), "reused": sum(sampled.values())}
        cost = training_cost(history, **reused, trained=options.epochs * lengths)
        session.finish(policy, history, title("dpo", options.round), cost=cost)


def preference_pairs(frames: list[pl.DataFrame], snapshot: Any) -> pl.DataFrame:
    """All pairs of a snapshot, the ties among them counted on stderr. Raises UsageError where all are ties."""
    pairs = pl.concat(frames)
    ties = sum(part.rows for part in snapshot) - pairs.height
    if not pairs.height:
        raise UsageError(f"all {ties} pairs of --data have equal rewards: there is nothing to prefer")
    print_to_log(f"dpo: {pairs.height} pairs; {ties} left out, their rewards are equal")
    return pairs


def refuse_foreign_pairs(pairs: pl.DataFrame, policy: Any) -> None:
    """Raise UsageError where a pair's ids are not the model's, or too many for it."""
    limits = _Limits(policy)
    for query, round, x_ids, *responses in pairs.select("query_id", "round", *IDS).iter_rows():
        for ids in responses:
            what = f"query {query!r} of round {round}: x and response"
            refuse_foreign_ids(pl.Series([*x_ids, *ids]).to_numpy(), what, limits)


class _Limits:
    """What a causal language model can take."""

    def __init__(self, causal: Any) -> None:
        self.vocabulary: int = causal.get_output_embeddings().weight.shape[0]
        self.positions: int | None = getattr(causal.config.get_text_config(), "max_position_embeddings", None)


def micro_batching(pairs: pl.DataFrame, batch_size: int, tokens: int) -> dict[str, int]:
    """Pairs at once and passes a step: the largest divisor of `batch_size` whose padded pairs stay below `tokens`."""
    lengths = [pl.col("x_ids").list.len() + pl.col(name).list.len() for name in IDS[1:]]
    longest = pairs.select(pl.max_horizontal(lengths).max()).item()
    at_once = largest_divisor(batch_size, tokens // (2 * longest))
    return {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": batch_size // at_once}


def _train(
    policy: Any,
    pairs: pl.DataFrame,
    tokenizer: Any,
    *,
    beta: float,
    arguments: dict[str, Any],
) -> list[dict[str, Any]]:
    """Run TRL's trainer over the stored ids, in place → metrics of every step."""
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    class IdsTrainer(DPOTrainer):
        """DPOTrainer on token ids: it would decode and tokenise, and add an end to responses that were cut."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    names = {"x_ids": "prompt_ids", "chosen_ids": "chosen_ids", "rejected_ids": "rejected_ids"}
    config = DPOConfig(**arguments, beta=beta, max_length=None)
    trainer = IdsTrainer(
        model=with_float32_logits(policy),
        args=one_device(config),
        train_dataset=Dataset.from_polars(pairs.select(names.keys()).rename(names)),
        processing_class=tokenizer,
    )
    if "ref" in policy.peft_config:
        policy.delete_adapter("ref")  # TRL's reference would be this round's start; without it, the adapter is off
    trainer.remove_callback(PrinterCallback)
    history: list[dict[str, Any]] = []
    steps = -(-pairs.height // (config.per_device_train_batch_size * config.gradient_accumulation_steps))
    with Progress("training", int(steps * config.num_train_epochs), "steps") as progress:
        trainer.add_callback(steps_callback(progress, history, lambda: len(history)))
        trainer.train()
    return history
