"""Tapered off-policy REINFORCE (Le Roux et al. 2025, arXiv 2503.14286), rewards less their mean over the pair.

With a = (reward - mean reward of the pair) of an arm and d = log pi - log pi_0 of it, the start policy standing for the
one that sampled, an arm is pushed up by its whole a, and down by a taper: a * min(1, e^d). That is the gradient of

    L = - a * d                                  where a > 0
    L = - a * (min(1, e^d) - 1 + max(0, d))      where a < 0

Bounded below: d cannot rise above - log pi_0, and below 0 the taper ends it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ple_train.objectives.pair_loss import Knobs, Pairs


def loss(pairs: Pairs, knobs: Knobs) -> Tensor:
    """TOPR's loss of each pair [n]."""
    half = pairs.margin / 2
    advantages = torch.stack([-half, half], dim=1)
    learned = pairs.learned
    tapered = torch.where(learned > 0, learned, learned.clamp(max=0).exp() - 1)
    return -(advantages * torch.where(advantages > 0, learned, tapered)).sum(1)
