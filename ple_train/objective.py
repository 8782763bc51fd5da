"""The PLE objective on micro-batches (Eq. 6 through `ple_train.loss`), its optional trust region and its metrics.

Drift is a response's mean log-probability now less the start policy's, in nats per token. It is measured on every
step with a trust region, else on every `DRIFT_EVERY`-th.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ple_train.batches import MicroBatch
from ple_train.log import print_to_log
from ple_train.loss import sum_by_response, trust_region, weighted_loss
from ple_train.policy import Policy

DRIFT_EVERY = 10
RUNAWAY_DRIFT = -1.0
"""Nats/token below the start policy at which pushed-down responses are said to run away."""
SETS, ARMS, AGES = ("rank", "wsft"), ("y", "y_prompt"), ("0", "1", "2plus")
GROUPS = tuple(f"{name}_{arm}" for name in SETS for arm in ARMS)
DRIFT_GROUPS = tuple(f"{group}_age{age}" for group in GROUPS for age in AGES)


class PairObjective:
    """- sum c * sum_j log pi / pairs over the responses of a micro-batch, and what to log about them."""

    sums: tuple[str, ...] = (
        "trained_tokens",
        "positions",
        "padding",
        "gated",
        "pushed_down_drift",
        "pushed_down",
        *(f"loss_{name}" for name in SETS),
        *(f"{what}_{group}" for what in ("logps", "count") for group in GROUPS),
        *(f"{what}_{group}" for what in ("drift", "drifted") for group in DRIFT_GROUPS),
    )
    remedy = "Lower --learning-rate, or bound the loss with --trust-region 0.3 (docs/training.md, Stability)."

    def __init__(self, policy: Policy, delta: float | None) -> None:
        self.policy, self.delta, self.layout = policy, delta, policy.layout
        self.warned = False

    def __call__(self, model: nn.Module, batch: MicroBatch, step: int) -> tuple[Tensor, dict[str, float]]:
        tokens = self.policy.collate(batch.sequences)
        logps = model(tokens)
        sum_logps = sum_by_response(logps, tokens.responses, len(batch.sequences))
        means = sum_logps.detach() / tokens.lengths
        coefficients = torch.tensor(
            [s.tag.coefficient for s in batch.sequences], device=logps.device, dtype=logps.dtype
        )
        drift = None
        if self.policy.has_start_policy and (self.delta is not None or step % DRIFT_EVERY == 0):
            drift = means - self._start_means(tokens, len(batch.sequences))
        kept = coefficients
        if self.delta is not None and drift is not None:
            kept = trust_region(coefficients, drift, self.delta)
        loss = weighted_loss(sum_logps, kept, batch.total) * batch.weight
        if batch.weight == 0:
            return loss, {}
        return loss, self._sums(
            batch, tokens, sum_logps.detach() * -kept / batch.total, means, coefficients, kept, drift
        )

    def _start_means(self, tokens: Any, responses: int) -> Tensor:
        with self.policy.as_start_policy():
            return sum_by_response(self.policy(tokens), tokens.responses, responses) / tokens.lengths

    def _sums(
        self,
        batch: MicroBatch,
        tokens: Any,
        losses: Tensor,
        means: Tensor,
        coefficients: Tensor,
        kept: Tensor,
        drift: Tensor | None,
    ) -> dict[str, float]:
        sums = dict.fromkeys(self.sums, 0.0)
        sums["trained_tokens"] = sum(s.response for s in batch.sequences if s.tag.coefficient != 0)
        sums["positions"], sums["padding"] = tokens.positions, tokens.padding
        sums["gated"] = float(((coefficients != 0) & (kept == 0)).sum())
        drifts = drift.tolist() if drift is not None else [None] * len(batch.sequences)
        for sequence, loss, mean, moved in zip(batch.sequences, losses.tolist(), means.tolist(), drifts, strict=True):
            tag = sequence.tag
            group = f"{tag.set}_{tag.arm}"
            sums[f"loss_{tag.set}"] += loss
            sums[f"logps_{group}"] += mean
            sums[f"count_{group}"] += 1
            if moved is not None:
                aged = f"{group}_age{AGES[min(tag.age, 2)]}"
                sums[f"drift_{aged}"] += moved
                sums[f"drifted_{aged}"] += 1
                if tag.coefficient < 0:
                    sums["pushed_down_drift"] += moved
                    sums["pushed_down"] += 1
        return sums

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
        }
        for group in GROUPS:
            metrics[f"mean_logps_{group}"] = _mean(sums[f"logps_{group}"], sums[f"count_{group}"])
        for group in DRIFT_GROUPS:
            metrics[f"drift_{group}"] = _mean(sums[f"drift_{group}"], sums[f"drifted_{group}"])
        metrics["drift_pushed_down"] = _mean(sums["pushed_down_drift"], sums["pushed_down"])
        self._warn_of_runaway(metrics["drift_pushed_down"])
        return metrics

    def _warn_of_runaway(self, drift: float | None) -> None:
        if not self.warned and drift is not None and math.isfinite(drift) and drift < RUNAWAY_DRIFT:
            self.warned = True
            print_to_log(
                f"warning: pushed-down responses have fallen {-drift:.2f} nats/token below the start policy; the "
                "printed loss has no lower bound. --trust-region 0.3 or a lower --learning-rate helps"
            )


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None
