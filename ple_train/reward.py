"""`ple reward`: a reward model from labelled texts (classifier) or from preferences (Bradley-Terry).

The result is a plain `AutoModelForSequenceClassification` with its tokenizer, read by `ple-score` and by anything else.
It never samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ple_data.common.device import default_device, load_weights, upload
from ple_data.inputs.readers import read_rows
from ple_data.rewards.texts import encode
from ple_train.engine.loop import Objective
from ple_train.engine.session import Session
from ple_train.engine.tabular import ShuffledSequences, column, file_digest
from ple_train.loss import preference_loss
from ple_train.model.batches import Layout, MicroBatch, Sequence
from schemas.errors import UsageError, first_line
from schemas.options import Join, Reward


class PaddedClassifier(nn.Module):
    """A sequence classifier that takes a list of sequences → logits [sequences, labels]."""

    def __init__(self, model: Any, pad: int) -> None:
        super().__init__()
        self.model, self.pad = model, pad

    def forward(self, sequences: list[Sequence]) -> Tensor:
        device = next(self.parameters()).device
        width = max(len(s.ids) for s in sequences)
        ids = np.full((len(sequences), width), self.pad, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence.ids)] = sequence.ids
            mask[row, : len(sequence.ids)] = 1
        inputs = {
            "input_ids": upload(ids, device),
            "attention_mask": upload(mask, device),
        }
        return self.model(**inputs).logits.float()


class LabelObjective:
    """Cross-entropy of the labels; `tag` of a sequence is its label."""

    sums: tuple[str, ...] = ("right", "rows")
    layout: Layout = "padded"
    remedy = "Lower --learning-rate."

    def __call__(self, model: nn.Module, batch: MicroBatch, step: int) -> tuple[Tensor, Tensor]:
        logits = model(batch.sequences)
        labels = upload(np.array([s.tag for s in batch.sequences]), logits.device)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum") / batch.total * batch.weight
        right = logits.argmax(1) == labels
        return loss, _added(right, torch.ones_like(right)) * batch.weight

    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        return {"accuracy": sums["right"] / sums["rows"]}


class PreferenceObjective:
    """Bradley-Terry over pairs; a sequence is a chosen text, beside it the rejected one."""

    sums: tuple[str, ...] = ("right", "rows", "margin")
    layout: Layout = "padded"
    remedy = "Lower --learning-rate."

    def __call__(self, model: nn.Module, batch: MicroBatch, step: int) -> tuple[Tensor, Tensor]:
        rewards = model([*batch.sequences, *(s.beside for s in batch.sequences)])[:, 0]
        chosen, rejected = rewards.chunk(2)
        loss = preference_loss(chosen, rejected, batch.total) * batch.weight
        margins = (chosen - rejected).detach()
        return loss, _added(margins > 0, torch.ones_like(margins), margins) * batch.weight

    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        return {"accuracy": sums["right"] / sums["rows"], "margin": sums["margin"] / sums["rows"]}


def _added(*by_row: Tensor) -> Tensor:
    """Each of the [rows] added up, [values] float64."""
    return torch.stack([values.double() for values in by_row]).sum(1)


def train_reward(options: Reward) -> None:
    """Train all weights of `model` as a reward model on `data`; write model and tokenizer to `output`.

    Columns text, label (0 .. k-1) make a classifier of k outputs; prompt, chosen, rejected a one-output model of the
    preferences. Texts are kept to their last `max_length` ids: the response stands at the end.
    Raises UsageError for bad data, LockedError while another process writes `output`.
    """
    more = {"data_digest": file_digest(options.data), "full": True}
    with Session("reward", options, more=more) as session:
        if session.finished:
            return
        tokenizer = session.load_tokenizer()
        sequences, labels = read_examples(options.data, tokenizer, options.max_length)
        tokenizer.model_max_length = options.max_length  # scoring cuts where training did
        if labels:
            tokenizer.chat_template = None  # it read plain texts, so scoring must not render chats
        classifier = _load_classifier(options, labels or 1, tokenizer.pad_token_id)
        wrapped = PaddedClassifier(classifier, tokenizer.pad_token_id).to(default_device())
        stream = ShuffledSequences(sequences, options.batch_size, options.seed, divisor=len)
        session.note_machine()
        objective: Objective = LabelObjective() if labels else PreferenceObjective()
        history = session.fit(wrapped, stream, objective, dict(classifier.named_parameters()))
        session.finish(classifier, history, "reward model")


def read_examples(data: Path, tokenizer: Any, max_length: int) -> tuple[list[Sequence], int]:
    """Sequences and the number of labels (0 for preferences: chosen texts, beside each the rejected one)."""
    rows = read_rows(data)
    if {"prompt", "chosen", "rejected"} <= set(rows.columns):
        prompts = column(rows, "prompt")
        chosen, rejected = (
            _encode(tokenizer, prompts, column(rows, side), max_length, join="auto") for side in ("chosen", "rejected")
        )
        return [Sequence(good, 0, beside=Sequence(bad, 0)) for good, bad in zip(chosen, rejected, strict=True)], 0
    if "label" not in rows.columns:
        raise UsageError(
            f"{data} needs columns text, label or prompt, chosen, rejected; it has {', '.join(rows.columns)}"
        )
    texts = column(rows, "text", "x")
    labels = [
        _label(label, f"{data} {place}")
        for place, label in zip(rows.places, column(rows, "label", of=object), strict=True)
    ]
    if max(labels) == 0:
        raise UsageError(f"{data}: every label is 0; a classifier needs at least two")
    ids = _encode(tokenizer, [""] * len(texts), texts, max_length, join="text")
    return [Sequence(i, 0, label) for i, label in zip(ids, labels, strict=True)], max(labels) + 1


def _label(value: Any, place: str) -> int:
    """A label as a number; a CSV file holds it as text."""
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    if not isinstance(value, int) or value < 0:
        raise UsageError(f"{place}: label {value!r} is not a whole number from 0 up; correct it")
    return value


def _encode(tokenizer: Any, xs: list[str], ys: list[str], max_length: int, join: Join) -> list[np.ndarray]:
    """Ids just as `ple-score` will make them of (x, y)."""
    encoded = (encode(tokenizer, x, y, join=join, max_length=max_length) for x, y in zip(xs, ys, strict=True))
    return [np.array(e.ids, dtype=np.int32) for e in encoded]


def _load_classifier(options: Reward, labels: int, pad: int) -> Any:
    """On the host: a new head is drawn there, since a GPU's generator would give other numbers."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(options.seed)
    try:
        classifier = load_weights(
            AutoModelForSequenceClassification,
            options.model,
            torch.device("cpu"),
            revision=options.revision,
            id2label={label: f"LABEL_{label}" for label in range(labels)},
            label2id={f"LABEL_{label}": label for label in range(labels)},
            ignore_mismatched_sizes=True,  # a head for another number of labels is replaced by a new one
            dtype=torch.float32,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"--model {options.model}: no model there that can classify ({first_line(error)})") from error
    classifier.config.pad_token_id = pad
    return classifier
