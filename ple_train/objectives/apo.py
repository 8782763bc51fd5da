"""Anchored Preference Optimization, APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266).

    L = 1 - sigmoid(beta * r+) + sigmoid(beta * r-)

r+ and r- are the log-ratios to the start policy of the arm with the higher reward and of the other: the one is pushed
up and the other down, each by itself. Between 0 and 2, and both pulls fade. Ties teach nothing.
"""

from __future__ import annotations

from torch import Tensor

from ple_train.objectives.pair_loss import Knobs, Pairs


def loss(pairs: Pairs, knobs: Knobs) -> Tensor:
    """APO-zero's loss of each pair [n]; 0 for a tie."""
    sign = pairs.margin.sign()
    plain, prompted = (knobs.beta * sign[:, None] * pairs.learned).unbind(1)
    return ((-prompted).sigmoid() + plain.sigmoid()) * pairs.decided
