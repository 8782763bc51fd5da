"""LoRA's product with fewer temporaries: peft's own layers, weights and files, with a cheaper forward and backward.

peft makes several tensors of the output's size, and autograd two more of the input's size. Its gradient of B has a
transposed side of width r, which is slow on a CPU. Here the low-rank parts are added by their own products, and only x
and A x are kept. Same function, same gradients (tests/ple_train/model/test_lora.py).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def fuse(model: nn.Module) -> None:
    """Give every plain LoRA layer (one adapter, no DoRA or other variant, no bias, dropout off, a frozen `nn.Linear`
    below it) the cheaper product."""
    for module in model.modules():
        if type(module) is Linear and _is_plain(module):
            module.__class__ = FusedLinear


class FusedLinear(Linear):
    """What `fuse` makes of a LoRA layer; with its adapter off, merged or one of several it answers as peft does."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] → [..., out]."""
        if args or kwargs or self.disable_adapters or self.merged or len(self.lora_A) != 1 or _is_trained(self):
            return super().forward(x, *args, **kwargs)
        (adapter,) = self.lora_A
        weight: Any = self.base_layer.weight
        bias: Any = self.base_layer.bias
        down: Any = self.lora_A[adapter].weight
        up: Any = self.lora_B[adapter].weight
        device = x.device.type
        if torch.is_autocast_enabled(device):
            kind = torch.get_autocast_dtype(device)
            x, weight, down, up = (part.to(kind) for part in (x, weight, down, up))
            bias = None if bias is None else bias.to(kind)
        elif down.dtype != weight.dtype:
            return super().forward(x)
        with torch.autocast(device, enabled=False):
            y = _LowRankSum.apply(x.flatten(0, -2), weight, bias, down, up, self.scaling[adapter])
        return y.unflatten(0, x.shape[:-1])


class _LowRankSum(torch.autograd.Function):
    """x [n, in], frozen W [out, in] and b [out], A [r, in], B [out, r] → x W' + b + scaling * (x A') B'."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        low = x @ down.T
        ctx.save_for_backward(x, weight, down, up, low)
        ctx.scaling = scaling
        return nn.functional.linear(x, weight, bias).addmm_(low, up.T, alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, low = ctx.saved_tensors
        grad_low = (grad @ up) * ctx.scaling
        grad_down = grad_low.T @ x
        grad_up = ((low.T @ grad) * ctx.scaling).T
        grad_x = (grad @ weight).addmm_(grad_low, down) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_down, grad_up, None


def _is_plain(module: Linear) -> bool:
    if len(module.lora_A) != 1 or module.lora_variant or type(module.base_layer) is not nn.Linear:
        return False
    dropouts = [m.p for m in module.lora_dropout.values() if isinstance(m, nn.Dropout)]
    return not (_is_trained(module) or any(dropouts)) and all(b.bias is None for b in module.lora_B.values())


def _is_trained(module: Linear) -> bool:
    """Whether the layer below the adapter is trained too."""
    return any(parameter.requires_grad for parameter in module.base_layer.parameters())
