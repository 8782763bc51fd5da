"""Training on pairs: an objective's loss on micro-batches, the optional trust region, and the metrics of both arms.

Whatever the loss, a step pushes log-probabilities by coefficients, - d loss / d log pi of each response: those of
Eq. 6, or those of another loss where it stands. So one weighted sum is differentiated (`ple_train.loss.weighted_loss`),
and the trust region holds for every loss. Drift is a response's mean log-probability now less the start policy's, in
nats per token. It is measured on every step where the start policy's log-probabilities are at hand, else on every
`DRIFT_EVERY`-th, and so is the entropy.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ple_data.common.device import upload
from ple_train.log import print_to_log
from ple_train.loss import sum_by_response, trust_region, weighted_loss
from ple_train.model.batches import MicroBatch, Sequence, Tokens
from ple_train.model.policy import Policy
from ple_train.objectives import loss_on_pairs
from ple_train.objectives.pair_loss import Knobs, Pairs
from schemas.options import OBJECTIVE_KINDS, Form, ObjectiveName
from schemas.tables import ARMS

DRIFT_EVERY = 10
RUNAWAY_DRIFT = -1.0
"""Nats/token below the start policy at which pushed-down responses are said to run away."""
SETS, AGES = ("rank", "wsft"), ("0", "1", "2plus")
GROUPS = tuple(f"{name}_{arm}" for name in SETS for arm in ARMS)
DRIFT_GROUPS = tuple(f"{group}_age{age}" for group in GROUPS for age in AGES)


class PairObjective:
    """The losses of pairs, added up and divided by the pairs of the global batch, and what to log about them.

    delta: of the trust region, nats a token, or None. Where the coefficients depend on more than the stored row, both
    arms of a pair must lie in one micro-batch.
    """

    sums: tuple[str, ...] = (
        "trained_tokens",
        "positions",
        "padding",
        "gated",
        "pushed_down_drift",
        "pushed_down",
        "entropy",
        "entropy_tokens",
        *(f"loss_{name}" for name in SETS),
        *(f"{what}_{group}" for what in ("logps", "count") for group in GROUPS),
        *(f"{what}_{group}" for what in ("drift", "drifted") for group in DRIFT_GROUPS),
    )
    remedy = "Lower --learning-rate, or bound the loss with --trust-region 0.3 (docs/training.md, Stability)."

    def __init__(
        self,
        policy: Policy,
        delta: float | None,
        name: ObjectiveName = "ple",
        knobs: Knobs | None = None,
        form: Form = "sums",
    ) -> None:
        self.policy, self.delta, self.knobs, self.form = policy, delta, knobs or Knobs(), form
        self.pair_loss, self.kind = loss_on_pairs(name), OBJECTIVE_KINDS[name]
        self.layout, self.together = policy.layout, not self.kind.linear
        self._places = {name: place for place, name in enumerate(self.sums)}
        self.warned = False
        if not self.kind.linear:
            self.remedy = "Lower --learning-rate, or raise --beta where the objective has one."

    def __call__(self, model: nn.Module, batch: MicroBatch, step: int) -> tuple[Tensor, Tensor]:
        tokens = self.policy.collate(batch.sequences)
        entropies = None
        if step % DRIFT_EVERY == 0:
            logps, entropies = model(tokens, entropies=True)
        else:
            logps = model(tokens)
        sum_logps = sum_by_response(logps, tokens.responses, len(batch.sequences))
        means = sum_logps.detach() / tokens.lengths
        start = self._start(batch, tokens, step, logps.dtype)
        drift = None if start is None else means - start / tokens.lengths
        coefficients, losses = self._coefficients(batch.sequences, sum_logps.detach(), start, tokens.lengths)
        kept = coefficients
        if self.delta is not None and drift is not None:
            kept = trust_region(coefficients, drift, self.delta)
        loss = weighted_loss(sum_logps, kept, batch.total) * batch.weight
        if batch.weight == 0:
            return loss, torch.zeros(len(self.sums), dtype=torch.float64, device=logps.device)
        if losses is None:
            losses = sum_logps.detach() * -kept
        else:  # the weighted sum has the gradient of the losses, and not their value
            loss = loss + (losses.sum() / batch.total - loss).detach()
        gated = ((coefficients != 0) & (kept == 0)).sum()
        measured = [(gated[None], ["gated"])]
        if entropies is not None:
            measured.append((entropies.sum()[None], ["entropy"]))
        return loss, self._sums(batch, tokens, losses / batch.total, means, coefficients, drift, measured)

    def _start(self, batch: MicroBatch, tokens: Tokens, step: int, dtype: torch.dtype) -> Tensor | None:
        """log pi_0 of each response [r]: kept beside the store, or computed here where it is wanted."""
        kept = [sequence.tag.start for sequence in batch.sequences]
        if None not in kept:
            return upload(np.array(kept), tokens.lengths.device).to(dtype)
        wanted = self.delta is not None or self.kind.start or step % DRIFT_EVERY == 0
        if not (wanted and self.policy.has_start_policy):
            return None
        with self.policy.as_start_policy():
            return sum_by_response(self.policy(tokens), tokens.responses, len(batch.sequences))

    def _coefficients(
        self, sequences: list[Sequence], sum_logps: Tensor, start: Tensor | None, lengths: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """By which log pi of each response [r] is pushed, and a response's share of the losses where they are not the
        weighted sum itself."""
        device, tags = sum_logps.device, [sequence.tag for sequence in sequences]
        coefficients = upload(np.array([tag.coefficient for tag in tags]), device).to(sum_logps.dtype)
        if self.kind.linear:
            return coefficients, None
        numbers, pair, arms = np.unique([s.query for s in sequences], return_inverse=True, return_counts=True)
        at = pair * 2 + np.array([ARMS.index(tag.arm) for tag in tags])
        places = upload(at, device)

        def by_arm(values: Tensor, empty: float = 0.0) -> Tensor:
            found = torch.full((2 * len(numbers),), empty, dtype=sum_logps.dtype, device=device)
            return found.index_copy(0, places, values.to(sum_logps.dtype)).view(-1, 2)

        margins = np.zeros(len(numbers))
        margins[pair] = [tag.margin for tag in tags]
        logps = by_arm(sum_logps).requires_grad_()
        pairs = Pairs(
            logps=logps,
            start=by_arm(sum_logps if start is None else start),
            lengths=by_arm(lengths, empty=1.0),
            coefficients=by_arm(coefficients),
            quantiles=by_arm(upload(np.array([tag.quantile for tag in tags]), device)),
            margin=upload(margins, device).to(sum_logps.dtype),
            form=self.form,
        )
        losses = self.pair_loss(pairs, self.knobs)
        (slopes,) = torch.autograd.grad(losses.sum(), logps)
        share = upload(1 / arms[pair], device).to(sum_logps.dtype)
        return -slopes.flatten()[places], losses.detach()[upload(pair, device)] * share

    def _sums(
        self,
        batch: MicroBatch,
        tokens: Tokens,
        losses: Tensor,
        means: Tensor,
        coefficients: Tensor,
        drift: Tensor | None,
        measured: list[tuple[Tensor, list[str]]],
    ) -> Tensor:
        """[sums]: what the host knows is counted there, what the device measured of each response is added there."""
        tags = [sequence.tag for sequence in batch.sequences]
        counted = dict.fromkeys(self.sums, 0.0)
        counted["trained_tokens"] = sum(
            s.response for s in batch.sequences if s.tag.coefficient != 0 or not self.kind.linear
        )
        counted["positions"], counted["padding"] = tokens.positions, tokens.padding
        counted["entropy_tokens"] = len(tokens.targets) if ["entropy"] in (names for _, names in measured) else 0
        for tag in tags:
            counted[f"count_{tag.set}_{tag.arm}"] += 1
        measured += [
            (losses, [f"loss_{tag.set}" for tag in tags]),
            (means, [f"logps_{tag.set}_{tag.arm}" for tag in tags]),
        ]
        if drift is not None:
            aged = [f"{tag.set}_{tag.arm}_age{AGES[min(tag.age, 2)]}" for tag in tags]
            for name in aged:
                counted[f"drifted_{name}"] += 1
            measured.append((drift, [f"drift_{name}" for name in aged]))
            down = coefficients < 0
            measured += [(down * drift, ["pushed_down_drift"] * len(tags)), (down, ["pushed_down"] * len(tags))]
        sums = upload(np.array([*counted.values()], dtype=np.float64), losses.device)
        places = upload(np.array([self._places[name] for _, names in measured for name in names]), losses.device)
        return sums.index_add_(0, places, torch.cat([values.double() for values, _ in measured]))

    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        """Metrics of a step; NaN-free: a group without responses has no value (null in the Parquet file)."""
        responses = sum(sums[f"count_{group}"] for group in GROUPS) or 1.0  # a batch may hold empty responses alone
        metrics: dict[str, Any] = {
            "loss_rank": sums["loss_rank"],
            "loss_wsft": sums["loss_wsft"],
            "rank_share": (sums["count_rank_y"] + sums["count_rank_y_prompt"]) / responses,
            "gated_share": sums["gated"] / responses,
            "useful_token_share": 1 - sums["padding"] / max(1.0, sums["positions"]),
            "trained_tokens": sums["trained_tokens"],
            "entropy": _mean(sums["entropy"], sums["entropy_tokens"]),
        }
        for group in GROUPS:
            metrics[f"mean_logps_{group}"] = _mean(sums[f"logps_{group}"], sums[f"count_{group}"])
        for group in DRIFT_GROUPS:
            metrics[f"drift_{group}"] = _mean(sums[f"drift_{group}"], sums[f"drifted_{group}"])
        metrics["drift_pushed_down"] = _mean(sums["pushed_down_drift"], sums["pushed_down"])
        self._warn_of_runaway(metrics["drift_pushed_down"])
        return metrics

    def _warn_of_runaway(self, drift: float | None) -> None:
        if (
            self.kind.linear
            and not self.warned
            and drift is not None
            and math.isfinite(drift)
            and drift < RUNAWAY_DRIFT
        ):
            self.warned = True
            print_to_log(
                f"warning: pushed-down responses have fallen {-drift:.2f} nats/token below the start policy; the "
                "printed loss has no lower bound. --trust-region 0.3 or a lower --learning-rate helps"
            )


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None
