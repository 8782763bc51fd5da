"""Quantile Reward Policy Optimization (Matrenok et al. 2025, arXiv 2507.08068), on each arm by itself.

    L = (q - beta * log Z - beta * d)^2,   log Z = log(beta * (e^(1 / beta) - 1))

q is the share of the plain responses to the query whose reward is at most the arm's, d its log pi - log pi_0. Quantiles
of the start policy's own rewards are uniform, which is why Z is known: exact in round 0, where the start policy sampled
them. At least 0: an arm comes to rest at d = (q - beta log Z) / beta.
"""

from __future__ import annotations

import math

from torch import Tensor

from ple_train.objectives.pair_loss import Knobs, Pairs


def loss(pairs: Pairs, knobs: Knobs) -> Tensor:
    """The squared error of both arms [n]."""
    beta = knobs.beta
    log_partition = math.log(beta) + 1 / beta + math.log1p(-math.exp(-1 / beta))
    return ((pairs.quantiles - beta * log_partition - beta * pairs.learned) ** 2).sum(1)
