"""`ple sft`: supervised fine-tuning by Eq. 1, the loss on the response only. Also trains a base model from nothing.

Rows are (x, y) texts. x may be empty (plain language modelling) or a chat; `finish` = "length" marks a y that was cut
and so gets no end-of-sequence id. Never samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ple_data.device import upload
from ple_data.digests import policy_name
from ple_data.models import check_model, load_tokenizer
from ple_data.principles import PromptFormat, render
from ple_data.readers import read_rows
from ple_train.batches import MicroBatch, Sequence
from ple_train.log import print_to_log
from ple_train.loop import LoopSettings, make_accelerator, train_loop
from ple_train.loss import sft_loss
from ple_train.output import Output
from ple_train.policy import Policy, load_policy, resolve_precision
from ple_train.tabular import ShuffledSequences, column, file_digest, refuse_too_long
from schemas.errors import UsageError

LEARNING_RATE = 1e-4


class SftObjective:
    """Eq. 1, divided by the response tokens of the global batch."""

    sums: tuple[str, ...] = ("response_tokens", "positions", "padding")
    remedy = "Lower --learning-rate."

    def __init__(self, policy: Policy) -> None:
        self.policy, self.layout = policy, policy.layout

    def __call__(self, model: nn.Module, batch: MicroBatch, step: int) -> tuple[Tensor, Tensor]:
        tokens = self.policy.collate(batch.sequences)
        loss = sft_loss(model(tokens), batch.total) * batch.weight
        counts = np.array([len(tokens.targets), tokens.positions, tokens.padding]) * batch.weight
        return loss, upload(counts, loss.device)

    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        return {
            "useful_token_share": 1 - sums["padding"] / sums["positions"],
            "trained_tokens": sums["response_tokens"],
        }


def sft(
    *,
    model: str,
    data: Path,
    output: Path,
    revision: str | None = None,
    lora_rank: int = 8,
    lora_alpha: int = 16,
    full: bool = False,
    merge: bool = True,
    prompt_format: PromptFormat = "auto",
    learning_rate: float = LEARNING_RATE,
    epochs: int = 1,
    batch_size: int = 32,
    warmup_steps: int = 0,
    schedule: str = "constant",
    weight_decay: float = 0.0,
    max_length: int | None = None,
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
    """Fine-tune `model` on `data` and write it to `output`: a full model with its tokenizer, or a LoRA adapter alone.

    A LoRA fine-tune is merged into its base unless `merge` is off, so that the result is the start policy pi_0.
    Rows whose x and y together exceed `max_length` ids are left out, and counted on stderr.
    Raises UsageError for bad data or settings, LockedError while another process writes `output`.
    """
    settings = {k: v if v is None else str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    for name in ("output", "resume", "checkpoint_every", "metrics", "report_to"):
        del settings[name]
    check_model(model)
    settings |= {"weights": policy_name(model, None, revision), "data_digest": file_digest(data)}
    accelerator = make_accelerator(report_to, output)
    with Output(output, "sft", settings, accelerator, resume=resume, metrics=metrics) as out:
        if out.finished:
            return
        tokenizer = load_tokenizer(model, revision, note=print_to_log)
        sequences = read_sequences(data, tokenizer, max_length, prompt_format)
        policy = load_policy(
            model,
            revision=revision,
            full=full,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            precision=precision,
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
            seed=seed,
        )
        refuse_too_long(sequences, policy.positions, model)
        stream = ShuffledSequences(sequences, batch_size, seed, divisor=lambda batch: sum(s.response for s in batch))
        out.note_machine(resolve_precision(precision), attention=policy.attention, layout=policy.layout)
        loop = LoopSettings(
            learning_rate=learning_rate,
            epochs=epochs,
            seed=seed,
            precision=resolve_precision(precision),
            microbatch_tokens=microbatch_tokens,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            schedule=schedule,
            checkpoint_every=checkpoint_every,
        )
        objective = SftObjective(policy)
        history = train_loop(
            accelerator, policy, policy.trainable(), stream, objective, loop, out.checkpoints, out.report
        )
        trained = policy.model if full or not merge else policy.model.merge_and_unload()
        out.finish(trained, tokenizer, history, title=f"{Path(model).name}, supervised fine-tuning (Eq. 1)")


def read_sequences(
    data: Path, tokenizer: Any, max_length: int | None, prompt_format: PromptFormat = "auto"
) -> list[Sequence]:
    """Rows of (x, y) as sequences: x rendered without a principle, y with its end-of-sequence id unless cut."""
    rows = read_rows(data)
    xs = column(rows, "x", "prompt", "messages", of=(str, list))
    ys = column(rows, "y", "response", "completion", "reference")
    finish = column(rows, "finish") if "finish" in rows.columns else ["stop"] * len(rows)
    for place, end in zip(rows.places, finish, strict=True):
        if end not in ("stop", "length"):
            raise UsageError(f"{data} {place}: finish is {end!r}; it must be stop or length")
    responses = tokenizer(ys, add_special_tokens=False)["input_ids"]
    sequences = []
    for x, y_ids, end in zip(xs, responses, finish, strict=True):
        prompt = render(tokenizer, x, prompt_format=prompt_format) if x else tokenizer("").input_ids
        ids = [*prompt, *y_ids, *([tokenizer.eos_token_id] if end == "stop" else [])]
        sequence = Sequence(np.array(ids, dtype=np.int32), len(prompt))
        if sequence.response > 0 and (max_length is None or len(ids) <= max_length):
            sequences.append(sequence)
    left_out = len(rows) - len(sequences)
    if not sequences:
        raise UsageError(f"{data}: no row to train on ({left_out} rows are empty or longer than --max-length)")
    if left_out:
        print_to_log(f"{left_out} of {len(rows)} rows left out: empty, or longer than --max-length {max_length}")
    return sequences
