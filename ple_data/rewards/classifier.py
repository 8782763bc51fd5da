"""A sequence classifier of transformers as reward model, from a directory or the hub.

One chosen output of the classification head, raw (no sigmoid or softmax), is the reward.
"""

import inspect
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ple_data.common.digests import policy_name
from ple_data.common.loading import loading
from ple_data.common.models import check_model, load_config, pad_id, positions_of, refuse_unknown, say_if_looked_up
from ple_data.rewards import RewardModel
from ple_data.rewards.texts import Encoded, encode, resolve_join
from schemas.errors import PleError, UsageError
from schemas.options import Rewards

DEFAULT_BATCH_TOKENS = 16384
"""Tokens of one batch, padding counted: enough to keep a GPU busy, small enough for a 7B model on 24 GiB."""
_OUTPUT = re.compile(r"\[(\d+)\]$")
_NO_LIMIT = 10**6
"""Tokenizers without a limit of their own report a huge number as model_max_length."""


def check(spec: str, options: Rewards) -> None:
    """Refuse what is no classifier, or has no such output, by its configuration alone. Raises UsageError."""
    model, output = split_output(spec, options.output_index)
    check_model(model)
    choose_output(load_config(model), output, model)


def takes(_: Rewards) -> set[str]:
    """A classifier has both."""
    return {"join", "output_index"}


def split_output(spec: str, output_index: int | None) -> tuple[str, int | None]:
    """The model of a spec, and the output that it names in brackets, else `output_index`."""
    found = _OUTPUT.search(spec)
    if found and not os.path.exists(spec):
        return spec[: found.start()], int(found.group(1))
    return spec, output_index


def outputs_of(spec: str) -> tuple[str, int]:
    """The model of a spec, and how many outputs it has. Raises UsageError."""
    model, _ = split_output(spec, None)
    check_model(model)
    return model, load_config(model).num_labels


class ClassifierReward(RewardModel):
    """AutoModelForSequenceClassification with its own tokenizer, attention mask and padding.

    Rows are batched by length under a token budget. The batch changes a reward by rounding alone (1e-4 in float32).
    """

    def __init__(self, spec: str, options: Rewards) -> None:
        """Load the model. Raises UsageError where it is no classifier or the output to use is not clear."""
        import torch

        from ple_data.common.device import chosen_device

        model, output = split_output(spec, options.output_index)
        dtype = options.reward_dtype
        self._device = chosen_device(options.reward_device, "--reward-device")
        self._tokenizer, self._model = _load(model, dtype=getattr(torch, dtype), device=self._device)
        config = self._model.config
        self._index = choose_output(config, output, model)
        self._join = resolve_join(options.join, self._tokenizer)
        self.runs_on = self._join == "text"
        self._batch_tokens = options.batch_tokens or DEFAULT_BATCH_TOKENS
        text_config = config.get_text_config()
        limits = self._tokenizer.model_max_length, positions_of(config)
        self._max_length = min((int(limit) for limit in limits if limit and 1 <= limit < _NO_LIMIT), default=None)
        skipped = text_config.pad_token_id  # by the model itself, when it looks for the last token
        self._vocabulary = self._model.get_input_embeddings().weight.shape[0]
        self._pad_id = skipped if skipped is not None and skipped >= 0 else None
        self._takes = inspect.signature(self._model.forward).parameters.keys()
        self.name = policy_name(model)
        if config.num_labels > 1:
            self.name += f"[{self._index}]"
        if self._join != resolve_join("auto", self._tokenizer):
            self.name += f"+{self._join}"
        if dtype != "float32":
            self.name += f"+{dtype}"

    def stream(self, rows: Sequence[tuple[str, str]]) -> Iterator[list[tuple[int, float]]]:
        for batch in self.logits(rows):
            yield [(row, outputs[self._index]) for row, outputs in batch]

    def logits(self, rows: Sequence[tuple[str, str]]) -> Iterator[list[tuple[int, list[float]]]]:
        """(row, all outputs) of each (x, y), of which `stream` gives the one that is the reward."""
        encoded = [encode(self._tokenizer, x, y, join=self._join, max_length=self._max_length) for x, y in rows]
        for (x, y), item in zip(rows, encoded, strict=True):
            if not item.ids:
                raise PleError(f"the reward model's tokenizer makes no token of x {x!r} and y {y!r}")
        refuse_unknown((item.ids for item in encoded), self._vocabulary, f"the reward model {self.name}")
        self.truncated += sum(item.cut for item in encoded)
        for batch in _batches([len(item.ids) for item in encoded], self._batch_tokens):
            yield list(zip(batch, self._forward([encoded[row] for row in batch]), strict=True))

    def _forward(self, batch: list[Encoded]) -> list[list[float]]:
        """The outputs of each row of one batch; the arrays are (rows, longest row)."""
        import torch

        from ple_data.common.device import upload

        left = self._tokenizer.padding_side == "left"
        longest = max(len(item.ids) for item in batch)
        pad = self._pad_id if self._pad_id is not None else self._free_pad_id(batch)

        def padded(rows: list[list[int]], fill: int) -> Any:
            gaps = [[fill] * (longest - len(row)) for row in rows]
            full = [gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)]
            return upload(np.array(full), self._device)

        ids = [item.ids for item in batch]
        inputs = {"input_ids": padded(ids, pad), "attention_mask": padded([[1] * len(row) for row in ids], 0)}
        if left and "position_ids" in self._takes:
            inputs["position_ids"] = padded([list(range(len(row))) for row in ids], 0)
        types = [item.token_type_ids for item in batch if item.token_type_ids is not None]
        if types and "token_type_ids" in self._takes:
            inputs["token_type_ids"] = padded(types, 0)
        try:
            with torch.inference_mode():
                logits = self._model(**inputs).logits
        except torch.cuda.OutOfMemoryError as error:
            raise PleError(
                f"the GPU has too little memory for a reward batch of {len(batch)} × {longest} tokens: "
                f"lower --batch-tokens (now {self._batch_tokens})"
            ) from error
        return logits.float().tolist()

    def _free_pad_id(self, batch: list[Encoded]) -> int:
        """A padding id for a model whose config names none.

        Such a model takes its reward at the last token of a text. In a batch, classifiers of the Llama and GPT-2 kind
        find that token as the last that differs from config.pad_token_id. So an id serves for padding exactly if no
        text of the batch ends with it: end-of-text, a common choice, would not.
        """
        endings = {item.ids[-1] for item in batch}
        preferred = pad_id(self._tokenizer, self._vocabulary)
        pad = next(i for i in itertools.chain([preferred], itertools.count()) if i not in endings)
        for config in (self._model.config, self._model.config.get_text_config()):
            config.pad_token_id = pad
        return pad


load = ClassifierReward


def _load(model: str, *, dtype: Any, device: Any) -> tuple[Any, Any]:
    """Tokenizer and model, in evaluation mode, on the device."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from ple_data.common.device import load_weights

    if os.path.exists(model):
        check_model(model)
    else:
        say_if_looked_up(model)
    advice = "neither a URL, nor file.py:function, nor a model that transformers can load as a sequence classifier"
    with loading(f"the reward model {model}", advice):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        tokenizer("a")  # some faults show when it is used
    what = f"the reward model {model}"
    loaded = load_weights(AutoModelForSequenceClassification, model, device, what, advice, dtype=dtype)
    return tokenizer, loaded.to(device).eval()


def choose_output(config: Any, chosen: int | None, model: str) -> int:
    """The output that is the reward: the chosen one, or the only one. Raises UsageError where that is not clear."""
    labels = ", ".join(f"{index} = {name}" for index, name in sorted(config.id2label.items()))
    if chosen is None:
        if config.num_labels == 1:
            return 0
        raise UsageError(
            f"reward model {model} has {config.num_labels} outputs ({labels}): "
            f"choose the one that is the reward with --output-index, or name it as in {model}[0]"
        )
    if not 0 <= chosen < config.num_labels:
        raise UsageError(f"reward model {model} has no output {chosen}: --output-index is one of {labels}")
    return chosen


def _batches(lengths: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches, longest rows first, rows × longest at most batch_tokens (one row at least)."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // lengths[order[start]])
        yield order[start : start + size]
        start += size
