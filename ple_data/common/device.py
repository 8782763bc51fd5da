"""Which device the work goes to and in which number type: the one room that asks torch what the machine has."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import cached_file, logging

from ple_data.common.loading import DAMAGED, loading
from ple_data.common.models import INDEX, index_files, load_config, refuse_foreign_files, refuse_quantized
from schemas.errors import UsageError

META = torch.device("meta")
"""For models that are wanted for their names and shapes alone."""
WEIGHT = re.compile(r"weight$|(?<!attn)(?<!attention)\.bias$")
"""How the names of weights end; old files also hold masks and rotations (`attn.bias`, `inv_freq`), which are none."""
STACK = re.compile(r"((?:[^.]+\.)*?)\d+\.")
"""A weight's name up to its first number: the layers, or blocks, that it belongs to."""
AMPERE = (8, 0)
"""The first compute capability of NVIDIA that multiplies bfloat16 by itself; older cards emulate it, slowly."""


def default_device() -> torch.device:
    """This process's GPU where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def chosen_device(name: str | None, option: str) -> torch.device:
    """The device of that name, `default_device` for None and `auto`. Raises UsageError where there is no such one."""
    if name in (None, "auto"):
        return default_device()
    try:
        device = torch.device(str(name))
    except RuntimeError as error:
        raise UsageError(f"{option} {name}: torch knows no such device; give cpu, cuda or cuda:N") from error
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UsageError(f"{option} {name}: torch finds {gpus} GPUs here; leave it out to take what there is")
    return device


def natural_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that computes in it, else float32. Never float16: its range is too small to train in."""
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) >= AMPERE):
        return torch.bfloat16
    return torch.float32


def describe(device: torch.device) -> str:
    """The device in words, for messages and records."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


def load_weights(
    kind: Any, model: str, device: torch.device, what: str, advice: str = DAMAGED, *, head: bool = False, **options: Any
) -> Any:
    """`kind.from_pretrained`, safetensors only and without the model's own code; no weight is ever made up.

    head: what lies outside of the body may be missing or of another shape, and is then new. options: `revision`,
    `config` (else the model's own), and what from_pretrained takes. Each weight goes straight to a GPU, never all of
    them to the host first; torch's attention is made ready for lengths that it has not seen. Raises UsageError that
    names `what` was loaded and gives `advice`.
    """
    config = options.pop("config", None) or load_config(model, options.get("revision"))
    with loading(what, advice):
        _refuse_unsafe(model, options.get("revision"), config)
    if torch.cuda.is_available():  # cuDNN's makes a plan for every new length: 120 ms on an H100, for 1 ms of work
        torch.backends.cuda.enable_cudnn_sdp(False)
    options |= {"use_safetensors": True, "trust_remote_code": False, "ignore_mismatched_sizes": True}
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)  # transformers' sdpa leaves it out
    if capped and options.setdefault("attn_implementation", "eager") == "sdpa":
        raise UsageError("attention sdpa leaves out this model's attn_logit_softcapping: use eager, or leave it out")
    for part in (config, config.get_text_config()):  # an id for padding that the embedding has no row for
        if (getattr(part, "pad_token_id", None) or 0) >= getattr(part, "vocab_size", math.inf):
            part.pad_token_id = None
    logging.disable_progress_bar()
    for place in dict.fromkeys((META, device)):  # nothing is made of sizes that do not fit the files
        there = {} if place.type == "cpu" else {"device_map": {"": place}}
        with loading(what, advice):
            loaded, info = kind.from_pretrained(model, config=config, output_loading_info=True, **options, **there)
        refuse_made_up(model, loaded, info, head)
    return loaded


def _refuse_unsafe(model: str, revision: str | None, config: Any) -> None:
    """Of a hub id what `check_model` refuses of a directory: quantized weights, pickles, an adapter beside a model."""
    refuse_quantized(model, config.to_dict())
    refuse_foreign_files(Path(model) / "config.json", [getattr(config, "transformers_weights", None)])
    if Path(model).is_dir():
        return
    found = partial(cached_file, model, revision=revision, _raise_exceptions_for_missing_entries=False)
    if found("adapter_config.json"):
        raise UsageError(f"{model} holds an adapter: download it, and give it with --adapter and its base with --model")
    if index := found(INDEX):
        index_files(Path(index))


def refuse_made_up(model: str, loaded: Any, info: dict[str, Any], head: bool) -> None:
    """Raise UsageError for weights that no file holds, or in another shape: they would be random numbers. Likewise for
    weights of layers that the files hold and the model has no place for."""
    body = f"{loaded.base_model_prefix}."
    shapes = {name: f" ({list(held)} instead of {list(wanted)})" for name, held, wanted in info["mismatched_keys"]}
    names = sorted({*info["missing_keys"], *shapes})
    if head:
        names = [name for name in names if name.startswith(body) and ".pooler." not in name]
    if names:
        raise UsageError(
            f"{model} is no trained {type(loaded).__name__}: its files lack "
            f"{_few([name + shapes.get(name, '') for name in names])}, which would be random numbers; get the files "
            "again, or name a model that was trained as one"
        )

    def stack(name: str) -> str | None:
        found = STACK.match(name.removeprefix(body))
        return found and found[1]

    stacks = {stack(name) for name in loaded.state_dict()} - {None}
    if left := sorted(name for name in info["unexpected_keys"] if WEIGHT.search(name) and stack(name) in stacks):
        raise UsageError(f"{model} holds {_few(left)}, for which its config.json has no place: give the one that fits")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_adapter(model: Any, adapter: str | Path, *, trainable: bool = False) -> Any:
    """`PeftModel` over a causal language model. Raises UsageError where it does not fit, lacks a weight or has one that
    nothing takes."""
    from peft import PeftModel, get_peft_model_state_dict

    missing, left = set[str](), set[str]()

    def note(_: Any, keys: Any) -> None:  # peft itself tells of some of them alone
        missing.update(keys.missing_keys)
        left.update(keys.unexpected_keys)

    device = "cpu" if model.device == META else str(model.device)
    hook = model.register_load_state_dict_post_hook(note)
    with loading(f"--adapter {adapter}", "it is damaged or does not fit this --model"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys|for .* is a no-op")
        options: dict[str, Any] = {"use_safetensors": True, "torch_device": device}
        tuned = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable, **options)
        own: dict[str, Any] = {name: name for name in tuned.state_dict()}
        held = get_peft_model_state_dict(tuned, own, save_embedding_layers=False)  # names in its file: in the model
    hook.remove()
    if lacking := [name for name, there in held.items() if there in missing]:
        raise UsageError(f"--adapter {adapter} lacks {_few(sorted(lacking))}, which would be made up: get it again")
    if left:
        raise UsageError(f"--adapter {adapter} holds {_few(sorted(left))}, for which its configuration has no place")
    return tuned


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """Host values as a tensor there; a GPU fetches them from pinned memory while the host goes on."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
