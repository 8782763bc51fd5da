"""LoRA's product without its temporaries: peft's own layers, weights and files, with a forward that costs less.

peft computes W x + scaling * B (A x) as three tensors of the output's size, and the gradient of B as a product of which
one side is transposed and eight wide, which CPU kernels do slowly. Here the low-rank part is scaled while it is narrow
and added by the product itself. Same function, same gradients (tests/test_policy.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


def fuse(model: nn.Module) -> None:
    """Give every plain LoRA layer (one adapter, no DoRA or other variant, no bias, dropout off) the cheaper forward."""
    for module in model.modules():
        if isinstance(module, Linear) and _is_plain(module):
            vars(module)["forward"] = partial(_forward, module)


def _is_plain(module: Any) -> bool:
    if len(module.lora_A) != 1 or module.lora_variant:
        return False
    dropouts = [m.p for m in module.lora_dropout.values() if isinstance(m, nn.Dropout)]
    return not any(dropouts) and all(b.bias is None for b in module.lora_B.values())


def _forward(module: Any, x: Tensor) -> Tensor:
    """x [..., in] → [..., out]."""
    result: Tensor = module.base_layer(x)
    if module.disable_adapters or module.merged:
        return result
    (adapter,) = module.lora_A
    down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(down.dtype)
    low = nn.functional.linear(x, down) * module.scaling[adapter]
    sum_ = torch.addmm(result.flatten(0, -2).to(low.dtype), low.flatten(0, -2), up.T.contiguous())
    return sum_.view(result.shape).to(result.dtype)
