"""The objective on single responses: Eq. 1."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from ple_data.common.device import upload
from ple_train.loss import sft_loss
from ple_train.model.batches import MicroBatch
from ple_train.model.policy import Policy


class SftObjective:
    """Eq. 1, divided by the response tokens of the global batch."""

    sums: tuple[str, ...] = ("response_tokens", "positions", "padding")
    together = False
    remedy = "Lower --learning-rate."

    def __init__(self, policy: Policy) -> None:
        self.policy, self.layout = policy, policy.layout

    def __call__(self, model: nn.Module, batch: MicroBatch, step: int) -> tuple[Tensor, Tensor]:
        tokens = self.policy.collate(batch.sequences)
        loss = sft_loss(model(tokens), batch.total) * batch.weight
        counts = np.array([len(tokens.targets), tokens.positions, tokens.padding]) * batch.weight
        return loss, upload(counts, loss.device)

    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        return {
            "useful_token_share": 1 - sums["padding"] / sums["positions"],
            "trained_tokens": sums["response_tokens"],
        }
