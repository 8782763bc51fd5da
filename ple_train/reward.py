"""`ple reward`: a reward model from labelled texts (classifier) or from preferences (Bradley-Terry).

The result is a plain `AutoModelForSequenceClassification` with its tokenizer, read by `ple-score` and by anything else.
`--test` measures it, `--eval` any other one. It never samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ple_data.common.device import default_device, load_weights
from ple_data.common.models import load_config, pad_id, positions_of, refuse_unknown
from ple_data.evaluation.accuracy import HeldOut, measure, read_held_out
from ple_data.inputs.columns import PREFERENCES, column, labels
from ple_data.inputs.readers import read_rows
from ple_data.rewards import kind_of
from ple_data.rewards.texts import encode
from ple_train.engine.session import Session
from ple_train.engine.tabular import ShuffledSequences, file_digest
from ple_train.log import is_first_process, print_to_log
from ple_train.model.batches import Sequence, padded_rows
from ple_train.model.policy import merged
from ple_train.objectives import make_objective
from schemas.errors import UsageError
from schemas.options import Join, Ppo, Reward, RewardTraining


class PaddedClassifier(nn.Module):
    """A sequence classifier that takes a list of sequences → logits [sequences, labels]."""

    def __init__(self, model: Any, pad: int) -> None:
        super().__init__()
        self.model, self.pad = model, pad

    def forward(self, sequences: list[Sequence]) -> Tensor:
        inputs = padded_rows(sequences, next(self.parameters()).device, self.pad)
        return self.model(**inputs).logits.float()


def reward(options: Reward) -> str | None:
    """`ple reward`: train one, measure it on --test where that is given; or with --eval only measure → what to print.

    Raises UsageError for options that do not go together.
    """
    if options.test is None and (options.group is not None or options.as_json):
        raise UsageError("--group and --json are of what is measured on --test: give that, or leave them out")
    test = read_held_out(options.test, options.group) if options.test else None
    if options.measured is not None:
        judge = kind_of(options.measured) == "judge"
        given = {"--model": options.model, "--data": options.data, "--output": None if judge else options.output}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise UsageError(f"{', '.join(wrong)}: --eval measures a reward model and trains none; leave it out")
        if test is None:
            raise UsageError("--eval measures on held-out rows: give them with --test")
        if judge and options.output is None:
            raise UsageError("--eval judge:MODEL: give --output, the folder in which its answers are kept")
        return measure(options.measured, test, options, options.output / "ratings" if judge else None)
    if None in (options.model, options.data, options.output):
        raise UsageError(
            "give --model, --data and --output to train a reward model, or --eval and --test to measure one"
        )
    train_reward(options, test)
    return measure(str(options.output), test, options) if test and is_first_process() else None


def train_reward(options: Reward, test: HeldOut | None = None) -> None:
    """Train `model` as a reward model on `data`; write model and tokenizer to `output`.

    Columns text, label (0 .. k-1) make a classifier of k outputs; prompt, chosen, rejected a one-output model of the
    preferences. Texts are kept to their last `max_length` ids: the response stands at the end. `test` must be of the
    same kind. Raises UsageError for bad data, LockedError while another process writes `output`.
    """
    more = {"data_digest": file_digest(options.data), "full": True}
    with Session("reward", options.part(RewardTraining), more=more) as session:
        if session.finished:
            return
        tokenizer = session.load_tokenizer(ends=False)
        longest = longest_text(options)
        sequences, outputs = read_examples(options.data, tokenizer, longest)
        _refuse_other_kind(options, test, outputs)
        tokenizer.model_max_length = longest  # scoring cuts where training did
        if outputs:
            tokenizer.chat_template = None  # it read plain texts, so scoring must not render chats
        classifier = load_classifier(options, outputs or 1)
        vocabulary = classifier.get_input_embeddings().weight.shape[0]
        texts = (each.ids for s in sequences for each in (s, s.beside) if each is not None)
        refuse_unknown(texts, vocabulary, options.model)
        pad = pad_id(tokenizer, vocabulary)
        classifier.config.pad_token_id = pad
        tuned = classifier if options.lora_rank is None else with_adapter(classifier, options)
        wrapped = PaddedClassifier(tuned, pad).to(default_device())
        stream = ShuffledSequences(sequences, options.batch_size, options.seed, divisor=len)
        session.note_machine(session.options.precision)
        objective = make_objective("label" if outputs else "preference")
        trained = {name: weight for name, weight in tuned.named_parameters() if weight.requires_grad}
        history = session.fit(wrapped, stream, objective, trained)
        session.finish(classifier if tuned is classifier else merged(tuned), history, "reward model")


def _refuse_other_kind(options: Reward, test: HeldOut | None, labels: int) -> None:
    """Before a training, not behind it."""
    if test and test.labels is not None and not labels:
        raise UsageError(f"{options.data} has preferences and --test {test.source} labels; give one kind for both")
    if test and test.labels is None and labels and options.output_index is None:
        raise UsageError(
            f"--test {test.source} has preferences, and a model of {options.data} an output for each label; say with "
            "--output-index which one is the reward"
        )


def with_adapter(classifier: Any, options: Reward) -> Any:
    """The classifier under a fresh LoRA adapter on each linear layer of its body; the rest is trained whole."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(options.seed)
    rank, alpha = cast(int, options.lora_rank), cast(int, options.lora_alpha)
    outside = [each for each in classifier.named_children() if each[1] is not classifier.base_model]
    heads = [name for name, part in outside if next(part.parameters(), None) is not None]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules="all-linear",
        exclude_modules=rf"({'|'.join(heads)})(\..*)?",
        modules_to_save=heads,
        task_type="SEQ_CLS",
    )
    return get_peft_model(classifier, config)


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
    if set(PREFERENCES) <= set(rows.columns):
        prompts = column(rows, "prompt")
        chosen, rejected = (
            _encode(tokenizer, prompts, column(rows, side), max_length, join="auto") for side in ("chosen", "rejected")
        )
        return [Sequence(good, 0, beside=Sequence(bad, 0)) for good, bad in zip(chosen, rejected, strict=True)], 0
    found, texts = labels(rows), column(rows, "text", "x")
    if max(found) == 0:
        raise UsageError(f"{data}: every label is 0; a classifier needs at least two")
    ids = _encode(tokenizer, [""] * len(texts), texts, max_length, join="text")
    return [Sequence(i, 0, label) for i, label in zip(ids, found, strict=True)], max(found) + 1


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
