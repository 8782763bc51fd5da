"""`ple sft`: supervised fine-tuning by Eq. 1, the loss on the response only. Also trains a base model from nothing.

Rows are (x, y) texts. x may be empty (plain language modelling) or a chat; `finish` = "length" marks a y that was cut
and so gets no end. Never samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ple_data.common.models import refuse_unknown
from ple_data.common.tokens import ids_after
from ple_data.inputs.columns import column
from ple_data.inputs.principles import render
from ple_data.inputs.queries import refuse_beyond_text
from ple_data.inputs.readers import read_rows
from ple_data.inputs.templates import instructed, response_form
from ple_train.engine.session import Session
from ple_train.engine.tabular import ShuffledSequences, file_digest
from ple_train.log import print_to_log
from ple_train.model.batches import Sequence
from ple_train.model.policy import Policy, merged
from ple_train.objectives import make_objective
from schemas.errors import UsageError
from schemas.options import PromptFormat, Sft


def sft(options: Sft) -> None:
    """Fine-tune `model` on `data` and write it to `output`: a full model with its tokenizer, or a LoRA adapter alone.

    A LoRA fine-tune is merged into its base unless `merge` is off, so that the result is the start policy pi_0.
    Raises UsageError for bad data or settings, LockedError while another process writes `output`.
    """
    if options.shard and options.merge and not options.full:
        raise UsageError("--shard keeps the adapter apart: add --no-merge, or --full")
    with Session("sft", options, more={"data_digest": file_digest(options.data)}) as session:
        if session.finished:
            return
        tokenizer = instructed(session.load_tokenizer(), options)
        sequences = read_sequences(options.data, tokenizer, options.max_length, options.prompt_format)
        policy = session.load_policy()
        stream = sequence_stream(sequences, policy, options)
        history = session.fit(policy, stream, make_objective("sft", policy))
        trained = policy.model if options.full or not options.merge else merged(policy.model)
        session.finish(trained, history, "supervised fine-tuning (Eq. 1)")


def sequence_stream(sequences: list[Sequence], policy: Policy, options: Any) -> ShuffledSequences:
    """Batches for Eq. 1. Raises UsageError where a sequence is longer than the model takes, or has ids of no token."""
    refuse_unknown((s.ids for s in sequences), policy.vocabulary, options.model)
    if policy.positions and (over := sum(len(s.ids) > policy.positions for s in sequences)):
        raise UsageError(
            f"{over} rows are longer than the {policy.positions} positions of {options.model}; use --max-length "
            f"{policy.positions}"
        )
    return ShuffledSequences(
        sequences, options.batch_size, options.seed, divisor=lambda batch: sum(s.response for s in batch)
    )


def read_sequences(
    data: Path, tokenizer: Any, max_length: int | None, prompt_format: PromptFormat = "auto"
) -> list[Sequence]:
    """Rows of (x, y) as sequences: x rendered without a principle, y with the id that ends it there unless cut."""
    rows = read_rows(data)
    xs = column(rows, "x", "prompt", "messages", of=(str, list))
    ys = column(rows, "y", "response", "completion", "reference")
    finish = column(rows, "finish") if "finish" in rows.columns else ["stop"] * len(rows)
    for place, row, x, end in zip(rows.places, rows.rows, xs, finish, strict=True):
        refuse_beyond_text(f"{data} {place}", x, row)
        if end not in ("stop", "length"):
            raise UsageError(f"{data} {place}: finish is {end!r}; it must be stop or length")
    empty = render(tokenizer, "", prompt_format="plain")
    prompts = [render(tokenizer, x, prompt_format=prompt_format) if x else empty for x in xs]
    form = response_form(tokenizer, prompt_format)
    responses = ids_after(tokenizer, prompts, ys, form.lead)
    sequences = []
    for x, prompt, y_ids, end in zip(xs, prompts, responses, finish, strict=True):
        ids = [*prompt, *y_ids, *([form.end if x else tokenizer.eos_token_id] if end == "stop" else [])]
        sequence = Sequence(np.array(ids, dtype=np.int32), len(prompt))
        if sequence.response > 0 and (max_length is None or len(ids) <= max_length):
            sequences.append(sequence)
    left_out = len(rows) - len(sequences)
    too_long = "" if max_length is None else f", or longer than --max-length {max_length}"
    if not sequences:
        raise UsageError(f"{data}: no row to train on ({left_out} rows are empty{too_long})")
    if left_out:
        print_to_log(f"{left_out} of {len(rows)} rows left out: empty{too_long}")
    return sequences
