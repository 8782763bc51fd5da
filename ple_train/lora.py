"""LoRA's product with fewer temporaries: peft's own layers, weights and files, with a forward that costs less.

peft computes W x + scaling * B (A x) as several tensors of the output's size, and the gradient of B as a product of
which one side is transposed and eight wide, which CPU kernels do slowly. Here the low-rank part is scaled while it is
narrow and added by the product itself. Same function, same gradients (tests/test_lora.py).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


def fuse(model: nn.Module) -> None:
    """Give every plain LoRA layer (one adapter, no DoRA or other variant, no bias, dropout off) the cheaper forward."""
    for module in model.modules():
        if type(module) is Linear and _is_plain(module):
            module.__class__ = FusedLinear


class FusedLinear(Linear):
    """What `fuse` makes of a LoRA layer; where it is no longer plain it answers as peft does."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] → [..., out]."""
        if args or kwargs or self.disable_adapters or self.merged or len(self.lora_A) != 1:
            return super().forward(x, *args, **kwargs)
        result: Tensor = self.base_layer(x)
        (adapter,) = self.lora_A
        down: Any = self.lora_A[adapter].weight
        up: Any = self.lora_B[adapter].weight
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(down.dtype)
        low = nn.functional.linear(x, down) * self.scaling[adapter]
        total = torch.addmm(result.flatten(0, -2).to(low.dtype), low.flatten(0, -2), up.T.contiguous())
        return total.view(result.shape).to(result.dtype)


def _is_plain(module: Linear) -> bool:
    if len(module.lora_A) != 1 or module.lora_variant:
        return False
    dropouts = [m.p for m in module.lora_dropout.values() if isinstance(m, nn.Dropout)]
    return not any(dropouts) and all(b.bias is None for b in module.lora_B.values())
