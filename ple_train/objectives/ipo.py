"""Identity Preference Optimization (Azar et al. 2023, arXiv 2310.12036), the arm with the higher reward preferred.

    L = (h - 1 / (2 beta))^2

h is the log-ratio to the start policy of the preferred arm less that of the other. At least 0: every pair comes to rest
at h = 1 / (2 beta), whatever its margin. Ties teach nothing.
"""

from __future__ import annotations

from torch import Tensor

from ple_train.objectives.pair_loss import Knobs, Pairs


def loss(pairs: Pairs, knobs: Knobs) -> Tensor:
    """IPO's loss of each pair [n]; 0 for a tie."""
    return (pairs.preferred - 1 / (2 * knobs.beta)) ** 2 * pairs.decided
