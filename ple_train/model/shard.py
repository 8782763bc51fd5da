"""A policy in parts: each of several processes holds a part of every weight (torch's `fully_shard`).

Weights are read part by part, so no process ever holds the whole model. Every layer is put together where it is
computed, and taken apart again. What is neither layer nor adapter of one (embeddings, the last norm, the output layer)
stays together from the policy's forward to its backward, since the loss reads it outside of its module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from ple_data.common.device import META, default_device, load_weights
from ple_data.common.models import weight_files
from ple_train.model.batches import Sequence
from schemas.errors import UsageError

FROZEN = ".base_layer"
"""What peft puts into the names of weights below an adapter."""


def is_shared() -> bool:
    """Whether there are several processes to share a model."""
    return dist.is_initialized() and dist.get_world_size() > 1


def empty_causal_lm(model: str, revision: str | None, dtype: torch.dtype) -> Any:
    """The causal language model with buffers, and with weights on the host that have a shape and no memory.

    Its files are checked as those of a model that is loaded. Raises UsageError.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    what = f"--model {model} as a causal language model"
    causal = load_weights(AutoModelForCausalLM, model, META, what, revision=revision, dtype=dtype)
    with init_empty_weights(include_buffers=False):
        twin = AutoModelForCausalLM.from_config(causal.config, dtype=dtype)
    held = dict(twin.named_buffers())
    for name, module in causal.named_modules():
        for own in list(module._buffers):
            module._buffers[own] = held[f"{name}.{own}" if name else own]
    causal._apply(lambda t: torch.empty((), dtype=t.dtype).expand(t.shape) if t.is_meta else t)
    causal.tie_weights()
    return causal


def share(policy: Any, layers: type[nn.Module] | tuple[type[nn.Module], ...], model: str, revision: str | None) -> None:
    """Give every process its part of the policy, in place. Raises UsageError where the files do not fit."""
    forget(policy)
    device = default_device()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in policy.modules():
        if isinstance(module, layers):
            fully_shard(module, mesh=mesh)
    fully_shard(policy, mesh=mesh, reshard_after_forward=False)
    unread = {name for name, parameter in policy.named_parameters() if parameter.is_meta}
    policy._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    places = weight_files(model, revision)
    for name, parameter in policy.named_parameters(remove_duplicate=False):
        if name in unread:
            unread.remove(name)
            _read_part(parameter, _in_file(name, policy, places), places)


def forget(module: nn.Module) -> None:
    """Weights without memory become weights without a place; ties stay."""
    known: dict[int, nn.Parameter] = {}
    for below in module.modules():
        for name, parameter in below._parameters.items():
            if parameter is not None and parameter.dim() and not any(parameter.stride()):
                empty = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
                below._parameters[name] = known.setdefault(id(parameter), empty)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that every process has a part of, put together; all processes call it. Others are what they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(target: Tensor, values: Tensor) -> None:
    """Copy a whole tensor, or this process's part of it, into one that is held whole or in parts."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            values = values.to(target.device, target.dtype)
            place = DTensor.from_local(values, target.device_mesh, [Replicate()], run_check=False)
            target.copy_(place.redistribute(placements=target.placements))
        else:
            target.copy_(values)


def like(target: Tensor, values: Tensor) -> Tensor:
    """`values` as a tensor that is held as `target` is, whole or in parts."""
    if not isinstance(target, DTensor):
        return values.to(target.device)
    return distribute_tensor(values.to(target.device), target.device_mesh, target.placements)


def take_apart(policy: Any) -> None:
    """A forward without a backward leaves together what the policy itself has: back into parts, where there are any."""
    if isinstance(policy, FSDPModule):
        policy.reshard()


@contextmanager
def in_step(policy: Any) -> Iterator[None]:
    """For processes with different numbers of forwards: each is made by all together, and whoever has none left joins
    in with one of a token. Does nothing where the policy is not in parts."""
    if not in_parts(policy):
        yield
        return
    idle = False

    def anyone(working: bool) -> bool:
        flag = torch.tensor([float(working)], device=policy.device)
        dist.all_reduce(flag)
        return bool(flag.item())

    def tell(*_: Any) -> None:
        if not idle:
            anyone(True)

    hook = policy.register_forward_pre_hook(tell, prepend=True)
    try:
        yield
        idle = True
        nothing = policy.collate([Sequence(np.zeros(2, dtype=np.int32), 1)])
        while anyone(False):
            policy(nothing)
    finally:
        hook.remove()


def _in_file(name: str, policy: Any, places: dict[str, Path]) -> str:
    """A weight's name in the model's files, which may lack the body's prefix, or have one."""
    base = policy._base[0]
    inner = next(key for key, value in policy.named_modules() if value is base)
    plain = name.removeprefix(f"{inner}.").replace(FROZEN, "")
    body = f"{base.base_model_prefix}."
    for candidate in (plain, plain.removeprefix(body), body + plain):
        if candidate in places:
            return candidate
    raise UsageError(
        f"--shard does not support {type(base).__name__}: it reads weights as they lie in the model's files, and these "
        f"have no {plain}, which transformers makes of others as it loads; leave --shard out"
    )


def _read_part(parameter: Any, name: str, places: dict[str, Path]) -> None:
    """This process's part of a weight, straight from its file."""
    from safetensors import safe_open

    local = parameter.to_local()
    shape, offset = list(local.shape), _offset(parameter)
    with safe_open(places[name], framework="pt") as file:
        if shape[0]:
            part = file.get_slice(name)[offset : offset + shape[0]]
            with torch.no_grad():
                local.copy_(part)


def _offset(parameter: Any) -> int:
    """Where this process's rows of a weight begin."""
    rows, size = parameter.shape[0], parameter.device_mesh.size()
    return min(rows, -(-rows // size) * parameter.device_mesh.get_local_rank())


def layers_of(causal: Any) -> tuple[type[nn.Module], ...]:
    """The classes of the model's layers, as transformers tells them. Raises UsageError where it does not."""
    names = set(getattr(causal, "_no_split_modules", None) or ())
    found = {type(module) for module in causal.modules() if type(module).__name__ in names}
    if not found:
        raise UsageError(f"--shard does not know what the layers of {type(causal).__name__} are: leave it out")
    return tuple(found)


def in_parts(model: nn.Module) -> bool:
    """Whether several processes share the model."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights, or all where there is none, whole and on the host of the first process; all processes call
    it."""
    adapter = hasattr(model, "peft_config")
    names, once = (dict(model.named_parameters(remove_duplicate=every)).keys() for every in (False, True))
    found = {}
    for name, parameter in model.state_dict().items():
        if name not in names - once and (not adapter or "lora_" in name):  # a tied weight stands once
            together = whole(parameter)
            if dist.get_rank() == 0:
                found[name] = together.cpu()
    return found
