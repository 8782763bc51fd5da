"""The objective of on-policy context distillation: reverse KL to the start policy under the principle.

`KL( pi_theta(.|x, y_<j) || pi_0(.|p, x, y_<j) )`, summed over the tokens of plain responses y that the policy sampled.
Reverse KL on a student's own samples: Agarwal et al. 2023, arXiv:2306.13649; context distillation: Snell et al. 2022,
arXiv:2209.15189. Its least value is 0, where the policy answers x as the start policy answers [p, x].
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from ple_data.common.device import upload
from ple_train.model.batches import MicroBatch
from ple_train.model.policy import Policy

COMPARED_EVERY = 10
"""Steps between two measurements of the start policy's own distance at the same tokens."""


class DistillationObjective:
    """Reverse KL, divided by the response tokens of the global batch; beside a sequence (x, y) stands (p, x, y)."""

    sums: tuple[str, ...] = ("response_tokens", "positions", "padding", "kl_start", "compared_tokens")
    together = False
    remedy = "Lower --learning-rate."

    def __init__(self, policy: Policy) -> None:
        self.policy, self.layout = policy, policy.layout

    def __call__(self, model: nn.Module, batch: MicroBatch, step: int) -> tuple[Tensor, Tensor]:
        tokens = self.policy.collate(batch.sequences)
        guided = self.policy.collate([s.beside for s in batch.sequences if s.beside])
        compared = step % COMPARED_EVERY == 0
        with self.policy.as_start_policy():
            teacher = self.policy(partial(self.policy.predicting, guided))
            start = self.policy(tokens, teacher).sum() if compared else 0.0
        loss = model(tokens, teacher).sum() / batch.total * batch.weight
        count, both = len(tokens.targets), (tokens, guided)
        of_both = sum(t.positions for t in both), sum(t.padding for t in both)
        sums = upload(np.array([count, *of_both, 0, count * compared], dtype=np.float64), loss.device)
        sums[self.sums.index("kl_start")] = start
        return loss, sums * batch.weight

    def summarise(self, sums: dict[str, float]) -> dict[str, Any]:
        """Metrics of a step; `loss` is KL in nats a token now, `kl_start` that of the start policy at its tokens."""
        return {
            "kl_start": sums["kl_start"] / sums["compared_tokens"] if sums["compared_tokens"] else None,
            "useful_token_share": 1 - sums["padding"] / sums["positions"],
            "trained_tokens": sums["response_tokens"],
        }
