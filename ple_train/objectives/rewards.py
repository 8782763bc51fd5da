"""The objectives of reward models, on labelled texts and on preferences."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ple_data.common.device import upload
from ple_train.loss import preference_loss
from ple_train.model.batches import Layout, MicroBatch


class LabelObjective:
    """Cross-entropy of the labels; `tag` of a sequence is its label."""

    sums: tuple[str, ...] = ("right", "rows")
    layout: Layout = "padded"
    together = False
    remedy = "Lower --learning-rate."

    def __call__(self, model: nn.Module, batch: MicroBatch, step: int) -> tuple[Tensor, Tensor]:
        logits = model(batch.sequences)
        labels = upload(np.array([s.tag for s in batch.sequences]), logits.device)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum") / batch.total * batch.weight
        right = logits.argmax(1) == labels
        return loss, _added(right, torch.ones_like(right)) * batch.weight

    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        return {"accuracy": sums["right"] / sums["rows"]}


class PreferenceObjective:
    """Bradley-Terry over pairs; a sequence is a chosen text, beside it the rejected one."""

    sums: tuple[str, ...] = ("right", "rows", "margin")
    layout: Layout = "padded"
    together = False
    remedy = "Lower --learning-rate."

    def __call__(self, model: nn.Module, batch: MicroBatch, step: int) -> tuple[Tensor, Tensor]:
        rewards = model([*batch.sequences, *(s.beside for s in batch.sequences)])[:, 0]
        chosen, rejected = rewards.chunk(2)
        loss = preference_loss(chosen, rejected, batch.total) * batch.weight
        margins = (chosen - rejected).detach()
        return loss, _added(margins > 0, torch.ones_like(margins), margins) * batch.weight

    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        return {"accuracy": sums["right"] / sums["rows"], "margin": sums["margin"] / sums["rows"]}


def _added(*by_row: Tensor) -> Tensor:
    """Each of the [rows] added up, [values] float64."""
    return torch.stack([values.double() for values in by_row]).sum(1)
