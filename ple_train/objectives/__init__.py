"""The math on responses: what a micro-batch costs, and what is logged about it. An objective is known by its name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from ple_train.model.batches import Layout, MicroBatch
from schemas.options import ObjectiveName

if TYPE_CHECKING:
    from ple_train.objectives.pair_loss import PairLoss

OBJECTIVES = {
    "pairs": "pairs:PairObjective",
    "sft": "responses:SftObjective",
    "distillation": "distillation:DistillationObjective",
    "label": "rewards:LabelObjective",
    "preference": "rewards:PreferenceObjective",
}
"""By name: the module here and its class. What pairs are trained on by is a `loss` in a module of its own name."""


class Objective(Protocol):
    """A loss on micro-batches, and what to add up over micro-batches and processes; `summarise` makes metrics of it.

    A call gives the loss and [sums] float64, both on the model's device, and never waits for it.
    """

    sums: tuple[str, ...]
    layout: Layout  # how the sequences of a micro-batch lie
    together: bool  # whether sequences of one query must lie in one micro-batch
    remedy: str  # what may help when the loss stops being finite

    def __call__(self, model: nn.Module, batch: MicroBatch, step: int) -> tuple[Tensor, Tensor]: ...

    def summarise(self, sums: dict[str, float]) -> dict[str, float]: ...


def make_objective(name: str, *given: Any) -> Objective:
    """The objective of that name, made from what its class asks for."""
    module, kind = OBJECTIVES[name].split(":")
    objective: Objective = getattr(importlib.import_module(f"{__name__}.{module}"), kind)(*given)
    return objective


def loss_on_pairs(name: ObjectiveName) -> PairLoss:
    """The loss on pairs of that name."""
    loss: PairLoss = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").loss
    return loss
