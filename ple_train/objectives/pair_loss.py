"""What an objective on pairs is: a pure function from what is known of pairs to their losses. Reads and trains nothing.

Each is in a module of this room, under its name, as `loss`. Arms are in the order (y, y_prompt), both given x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from schemas.options import Form


@dataclass(frozen=True)
class Knobs:
    """How an objective is set. tau: threshold of the rank set, in units of the reward, infinite without that set.

    beta: see each objective. label_smoothing: share of the preferences that are taken to be wrong. weighted: whether
    pairs outside the rank set are trained on.
    """

    tau: float = 0.0
    beta: float = 1.0
    label_smoothing: float = 0.0
    weighted: bool = True


@dataclass(frozen=True)
class Pairs:
    """[n] pairs. An arm that is empty has 0 everywhere and the length 1.

    logps, start: sum of log pi(token | earlier tokens, x) now and under the start policy, nats; lengths: tokens;
    coefficients: those of Eq. 6 (`ple_data.partition`); quantiles: share of the plain responses to the same query whose
    reward is at most the arm's. All [n, 2]. margin [n]: s_prompt - s. form: what `learned` is made of.
    """

    logps: Tensor
    start: Tensor
    lengths: Tensor
    coefficients: Tensor
    quantiles: Tensor
    margin: Tensor
    form: Form = "sums"

    @property
    def learned(self) -> Tensor:
        """log pi - log pi_0 of each arm [n, 2], in nats a response (sums) or a token (means)."""
        ratio = self.logps - self.start
        return ratio / self.lengths if self.form == "means" else ratio

    @property
    def delta(self) -> Tensor:
        """What the policy has learned of the pair already [n]: `learned` of y_prompt less that of y."""
        return self.learned[:, 1] - self.learned[:, 0]

    @property
    def preferred(self) -> Tensor:
        """`delta` [n] towards the arm with the higher reward."""
        return self.delta * self.margin.sign()

    @property
    def decided(self) -> Tensor:
        """1 where the rewards differ, else 0, [n]: there is nothing to prefer in a tie."""
        return self.margin.sign().abs()


PairLoss = Callable[[Pairs, Knobs], Tensor]
"""The loss [n] of each pair."""
