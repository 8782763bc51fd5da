"""Which device the work goes to and in which number type: the one room that asks torch what the machine has."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from schemas.errors import UsageError

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


def load_weights(kind: Any, model: str, device: torch.device, **options: Any) -> Any:
    """`kind.from_pretrained`, safetensors only and without the model's own code.

    Each weight goes straight to a GPU, never all of them to the host first; torch's attention is made ready for lengths
    that it has not seen. Raises what transformers raises.
    """
    if device.type != "cpu":
        options["device_map"] = {"": device}
    if torch.cuda.is_available():  # cuDNN's makes a plan for every new length: 120 ms on an H100, for 1 ms of work
        torch.backends.cuda.enable_cudnn_sdp(False)
    return kind.from_pretrained(model, use_safetensors=True, trust_remote_code=False, **options)


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """Host values as a tensor there; a GPU fetches them from pinned memory while the host goes on."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
