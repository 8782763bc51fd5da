"""The PLE objective on micro-batches (Eq. 6 through `ple_train.loss`), its optional trust region and its metrics.

Drift is a response's mean log-probability now less the start policy's, in nats per token. It is measured on every
step with a trust region, else on every `DRIFT_EVERY`-th.
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
from ple_train.model.batches import MicroBatch, Tokens
from ple_train.model.policy import Policy
from schemas.tables import ARMS

DRIFT_EVERY = 10
RUNAWAY_DRIFT = -1.0
"""Nats/token below the start policy at which pushed-down responses are said to run away."""
SETS, AGES = ("rank", "wsft"), ("0", "1", "2plus")
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
        self._places = {name: place for place, name in enumerate(self.sums)}
        self.warned = False

    def __call__(self, model: nn.Module, batch: MicroBatch, step: int) -> tuple[Tensor, Tensor]:
        tokens = self.policy.collate(batch.sequences)
        logps = model(tokens)
        sum_logps = sum_by_response(logps, tokens.responses, len(batch.sequences))
        means = sum_logps.detach() / tokens.lengths
        coefficients = upload(np.array([s.tag.coefficient for s in batch.sequences]), logps.device).to(logps.dtype)
        drift = None
        if self.policy.has_start_policy and (self.delta is not None or step % DRIFT_EVERY == 0):
            with self.policy.as_start_policy():
                start = sum_by_response(self.policy(tokens), tokens.responses, len(batch.sequences))
            drift = means - start / tokens.lengths
        kept = coefficients
        if self.delta is not None and drift is not None:
            kept = trust_region(coefficients, drift, self.delta)
        loss = weighted_loss(sum_logps, kept, batch.total) * batch.weight
        if batch.weight == 0:
            return loss, torch.zeros(len(self.sums), dtype=torch.float64, device=logps.device)
        losses = sum_logps.detach() * -kept / batch.total
        gated = ((coefficients != 0) & (kept == 0)).sum()
        return loss, self._sums(batch, tokens, losses, means, gated, drift)

    def _sums(
        self, batch: MicroBatch, tokens: Tokens, losses: Tensor, means: Tensor, gated: Tensor, drift: Tensor | None
    ) -> Tensor:
        """[sums]: what the host knows is counted there, what the device measured of each response is added there."""
        tags = [sequence.tag for sequence in batch.sequences]
        counted = dict.fromkeys(self.sums, 0.0)
        counted["trained_tokens"] = sum(s.response for s in batch.sequences if s.tag.coefficient != 0)
        counted["positions"], counted["padding"] = tokens.positions, tokens.padding
        for tag in tags:
            counted[f"count_{tag.set}_{tag.arm}"] += 1
        measured = [
            (gated[None], ["gated"]),
            (losses, [f"loss_{tag.set}" for tag in tags]),
            (means, [f"logps_{tag.set}_{tag.arm}" for tag in tags]),
        ]
        if drift is not None:
            aged = [f"{tag.set}_{tag.arm}_age{AGES[min(tag.age, 2)]}" for tag in tags]
            down = np.array([at for at, tag in enumerate(tags) if tag.coefficient < 0], dtype=np.int64)
            for name in aged:
                counted[f"drifted_{name}"] += 1
            counted["pushed_down"] = len(down)
            measured.append((drift, [f"drift_{name}" for name in aged]))
            measured.append((drift.index_select(0, upload(down, drift.device)), ["pushed_down_drift"] * len(down)))
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
