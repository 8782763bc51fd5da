"""Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290), the arm with the higher reward preferred.

    L = - (1 - e) * log sigmoid(beta * h) - e * log sigmoid(- beta * h)

h is the log-ratio to the start policy of the preferred arm less that of the other. e = --label-smoothing > 0 is
conservative DPO (Mitchell 2023). --form means divides each log-ratio by the response's length (Meng et al. 2024). The
pull of a pair fades as beta * h grows, so L is at least 0, but without e no pair ever comes to rest. Ties teach
nothing.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from ple_train.objectives.pair_loss import Knobs, Pairs


def loss(pairs: Pairs, knobs: Knobs) -> Tensor:
    """DPO's loss of each pair [n]; 0 for a tie."""
    right, wrong = (logsigmoid(sign * knobs.beta * pairs.preferred) for sign in (1, -1))
    return -((1 - knobs.label_smoothing) * right + knobs.label_smoothing * wrong) * pairs.decided
