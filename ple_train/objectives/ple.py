"""PLE as the paper prints it (Eqs. 3 to 6): L = - sum over both arms of c * log pi(y|x).

c are the coefficients of `ple_data.partition`, which has the equations and the safeguards. Linear in log-probabilities:
not bounded below, unless by --trust-region. `PairObjective` pushes by c itself; this is the loss that it amounts to.
"""

from __future__ import annotations

from torch import Tensor

from ple_train.objectives.pair_loss import Knobs, Pairs


def loss(pairs: Pairs, knobs: Knobs) -> Tensor:
    """- c(y) log pi(y|x) - c(y_prompt) log pi(y_prompt|x), [n]."""
    return -(pairs.coefficients * pairs.logps).sum(1)
