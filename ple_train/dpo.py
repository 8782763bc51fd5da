"""`ple baseline dpo`: TRL's DPOTrainer on the pairs of a store, the response with the higher reward chosen.

The token ids are the stored ones: TRL's own tokenising is left out, so nothing drifts. The reference is the start
policy, that is the model with its adapter off, in every round. Never samples. A killed run starts over: TRL's
checkpoints are pickles, which this project does not read.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import polars as pl

from ple_data import selection
from ple_data.digests import policy_name
from ple_data.models import check_adapter, check_model, load_tokenizer
from ple_data.progress import Progress
from ple_train.baseline import COLUMNS, LEARNING_RATE, title
from ple_train.cost import training_cost
from ple_train.log import print_to_log
from ple_train.loop import make_accelerator
from ple_train.output import Output
from ple_train.pairs import read_rows, refuse_foreign_ids, sampled_by_round
from ple_train.policy import load_trainable, resolve_precision
from ple_train.train import frozen_snapshot, note_later_pairs, refuse_doubled_stores, refuse_other_lora
from ple_train.trl_tools import (
    largest_divisor,
    one_device,
    quiet_trl,
    refuse_many_processes,
    require_trl,
    steps_callback,
    training_arguments,
    with_float32_logits,
)
from schemas.errors import UsageError

BETA = 0.1
IDS = ["x_ids", "chosen_ids", "rejected_ids"]


def dpo(
    *,
    model: str,
    data: list[Path],
    output: Path,
    round: int,
    adapter: str | None = None,
    revision: str | None = None,
    beta: float = BETA,
    lora_rank: int = 8,
    lora_alpha: int = 16,
    learning_rate: float = LEARNING_RATE,
    epochs: int = 1,
    batch_size: int = 16,
    max_length: int | None = None,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    resume: bool = True,
    precision: str = "auto",
    gradient_checkpointing: bool = False,
    microbatch_tokens: int = 8192,
    metrics: Path | None = None,
) -> None:
    """Direct Preference Optimization (Rafailov et al. 2023) on the pairs of all rounds ≤ `round`; writes `output`.

    Pairs with equal rewards are left out, and counted on stderr. `batch_size` is in pairs. `beta` scales the
    log-ratio to the start policy. Raises UsageError, DamagedError (a shard), LockedError, PleError (NaN).
    """
    settings: dict[str, Any] = {"method": "dpo", **locals()}
    for name in ("output", "resume", "metrics"):
        del settings[name]
    settings["trl"] = require_trl("dpo", output if resume else None)
    check_model(model)
    if adapter:
        refuse_other_lora(check_adapter(adapter, model), lora_rank, lora_alpha)
    refuse_doubled_stores(data)
    settings["data"] = [str(path) for path in data]
    settings["weights"] = policy_name(model, adapter, revision)

    accelerator = make_accelerator()
    refuse_many_processes(accelerator)
    with Output(output, "baseline", settings, accelerator, resume=resume, metrics=metrics) as out:
        if out.finished:
            note_later_pairs(out, data, round)
            return
        snapshot = frozen_snapshot(out, data, round, max_length)
        frames = [selection.preferences(read_rows(part, COLUMNS, max_length)) for part in snapshot]
        pairs = preference_pairs(frames, snapshot)
        tokenizer = load_tokenizer(model, revision, note=print_to_log)
        policy = load_trainable(
            model,
            adapter=adapter,
            revision=revision,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            precision=precision,
            seed=seed,
        )
        refuse_foreign_pairs(pairs, policy)
        out.note_machine(resolve_precision(precision))
        scratch = out.private / "trl"
        with quiet_trl():
            history = _train(
                policy,
                pairs,
                tokenizer,
                beta=beta,
                gradient_checkpointing=gradient_checkpointing,
                arguments=training_arguments(scratch, learning_rate=learning_rate, seed=seed)
                | {"num_train_epochs": epochs, "max_grad_norm": max_grad_norm}
                | micro_batching(pairs, batch_size, microbatch_tokens),
            )
        shutil.rmtree(scratch, ignore_errors=True)
        sampled = sampled_by_round(snapshot, ("y_ids", "y_prompt_ids"))
        trained = epochs * pairs.select(pl.sum_horizontal(pl.col(name).list.len() for name in IDS[1:]).sum()).item()
        cost = training_cost(history, sampled=sampled.pop(round, 0), reused=sum(sampled.values()), trained=trained)
        out.finish(policy, tokenizer, history, title=title(model, "dpo", round), cost=cost)


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
    gradient_checkpointing: bool,
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
    config = DPOConfig(**arguments | {"gradient_checkpointing": gradient_checkpointing}, beta=beta, max_length=None)
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
