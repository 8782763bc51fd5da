"""REBEL: regression to relative rewards (Gao et al. 2024, arXiv 2404.16767, with beta for its 1 / eta).

    L = (beta * Delta - (s_prompt - s))^2

Delta is what the policy has learned of the pair since the start policy. At least 0: a pair comes to rest where
beta * Delta is its margin, and its pull grows with the distance from there, without a bound.
"""

from __future__ import annotations

from torch import Tensor

from ple_train.objectives.pair_loss import Knobs, Pairs


def loss(pairs: Pairs, knobs: Knobs) -> Tensor:
    """The squared error of each pair [n]."""
    return (knobs.beta * pairs.delta - pairs.margin) ** 2
