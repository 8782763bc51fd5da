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

from ple_data.common.device import default_device, load_weights
from ple_data.common.models import load_config, pad_id, positions_of, refuse_unknown
from ple_data.inputs.readers import read_rows
from ple_data.rewards.texts import encode
from ple_train.engine.session import Session
from ple_train.engine.tabular import ShuffledSequences, column, file_digest
from ple_train.log import print_to_log
from ple_train.model.batches import Sequence, padded_rows
from ple_train.objectives import make_objective
from schemas.errors import UsageError
from schemas.options import Join, Ppo, Reward


class PaddedClassifier(nn.Module):
    """A sequence classifier that takes a list of sequences → logits [sequences, labels]."""

    def __init__(self, model: Any, pad: int) -> None:
        super().__init__()
        self.model, self.pad = model, pad

    def forward(self, sequences: list[Sequence]) -> Tensor:
        inputs = padded_rows(sequences, next(self.parameters()).device, self.pad)
        return self.model(**inputs).logits.float()


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
        tokenizer = session.load_tokenizer(ends=False)
        longest = longest_text(options)
        sequences, labels = read_examples(options.data, tokenizer, longest)
        tokenizer.model_max_length = longest  # scoring cuts where training did
        if labels:
            tokenizer.chat_template = None  # it read plain texts, so scoring must not render chats
        classifier = load_classifier(options, labels or 1)
        vocabulary = classifier.get_input_embeddings().weight.shape[0]
        texts = (each.ids for s in sequences for each in (s, s.beside) if each is not None)
        refuse_unknown(texts, vocabulary, options.model)
        pad = pad_id(tokenizer, vocabulary)
        classifier.config.pad_token_id = pad
        wrapped = PaddedClassifier(classifier, pad).to(default_device())
        stream = ShuffledSequences(sequences, options.batch_size, options.seed, divisor=len)
        session.note_machine(session.options.precision)
        objective = make_objective("label" if labels else "preference")
        history = session.fit(wrapped, stream, objective, dict(classifier.named_parameters()))
        session.finish(classifier, history, "reward model")


def longest_text(options: Reward) -> int:
    """--max-length, or the positions of the model where it has fewer; says so on stderr."""
    positions = positions_of(load_config(options.model, options.revision))
    if positions is None or options.max_length <= positions:
        return options.max_length
    print_to_log(f"note: {options.model} has {positions} positions: texts are kept to their last {positions} ids")
    return positions


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


def load_classifier(options: Reward | Ppo, labels: int) -> Any:
    """`model` with a head of so many outputs, in float32. On the host: a GPU's generator would draw another head.

    Raises UsageError where there is no such model.
    """
    from transformers import AutoModelForSequenceClassification

    names = {label: f"LABEL_{label}" for label in range(labels)}
    numbers = {name: label for label, name in names.items()}
    config = load_config(options.model, options.revision, id2label=names, label2id=numbers)
    what = f"--model {options.model} as a classifier"
    torch.manual_seed(options.seed)
    more: dict[str, Any] = {"revision": options.revision, "config": config, "dtype": torch.float32, "head": True}
    return load_weights(AutoModelForSequenceClassification, options.model, torch.device("cpu"), what, **more)
