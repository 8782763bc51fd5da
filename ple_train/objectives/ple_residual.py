"""PLE whose margins stop by themselves: ours, not in the paper.

Eqs. 3 to 5 with the residual margin m = (s_prompt - s) - beta * Delta in place of s_prompt - s, where Delta is what the
policy has learned of the pair (means over tokens, or sums): rank set where m > tau, else weights of +- tanh(m / 2).
The gradients go through Delta alone, and with respect to it they are those of

    L = (2 / beta) * log cosh(m / 2)                                      where m <= tau
    L = (m - tau) / beta + (2 / beta) * log cosh(tau / 2)                 where m > tau

so L is convex in Delta and at least 0: a pair comes to rest where beta * Delta is its margin. The pull on a pair is at
most 1 a response. A small beta lets margins grow far: it is the brake, in units of the reward by nat.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ple_train.objectives.pair_loss import Knobs, Pairs


def loss(pairs: Pairs, knobs: Knobs) -> Tensor:
    """The residual loss of each pair [n]."""
    residual = pairs.margin - knobs.beta * pairs.delta
    weighted = 2 / knobs.beta * log_cosh(residual / 2) * knobs.weighted
    if math.isinf(knobs.tau):
        return weighted
    at_tau = 2 / knobs.beta * log_cosh(residual.new_tensor(knobs.tau / 2)) * knobs.weighted
    return torch.where(residual > knobs.tau, (residual - knobs.tau) / knobs.beta + at_tau, weighted)


def log_cosh(x: Tensor) -> Tensor:
    """log cosh without overflow."""
    size = x.abs()
    return size + softplus(-2 * size) - math.log(2)
