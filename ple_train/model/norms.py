"""RMS norms in one kernel each way on a GPU, where transformers' own take some twenty passes over the hidden states.

Same function up to the rounding of bfloat16 (`test_norms.py`). Leaves a processor's arithmetic as it is.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

TRIALS = 8


def fuse_norms(model: nn.Module) -> None:
    """Give every RMS norm that is one by its own answers torch's kernel."""
    kinds: dict[type, type | None] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in kinds:
            kinds[kind] = _fused(kind) if _is_rms_norm(module) else None
        if found := kinds[kind]:
            module.__class__ = found


def _is_rms_norm(module: Any) -> bool:
    """Tried on numbers: some architectures keep their weight less 1, or round in between."""
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(epsilon, float):
        return False
    numbers = torch.Generator().manual_seed(0)
    kind: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    x = torch.randn(TRIALS, len(weight), generator=numbers).to(**kind)
    other = torch.randn(len(weight), generator=numbers).to(**kind)
    trial = copy(module)
    stand_in = nn.Parameter(other, requires_grad=False)  # its own may be in parts
    trial.__dict__["_parameters"] = module._parameters | {"weight": stand_in}
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        found, expected = trial(x).float(), nn.functional.rms_norm(x, other.shape, other, epsilon).float()
    return bool(torch.allclose(found, expected, rtol=0.02, atol=1e-6))


def _fused(kind: type) -> type:
    """A subclass: isinstance goes on to hold, and what is not of one number type is computed as before."""

    class FusedNorm(kind):
        def forward(self, x: Tensor) -> Tensor:
            """x [..., d] → [..., d]."""
            if x.dtype != self.weight.dtype:
                return super().forward(x)
            with torch.autocast(x.device.type, enabled=False):
                return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    return FusedNorm
