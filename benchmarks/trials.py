"""Forms of the residual loss that were tried on a real model and are not in the product. They train nothing.

center      the margin less its mean over the pairs
split       each arm has a target of its own, minus and plus half the margin; without a rank set
importance  a pair counts exp(min(0, mean log pi_0(y_prompt|x) - mean log pi_0(y_prompt|p, x)))
both        more: the squares of both arms' `learned`, so that neither goes far
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import polars as pl
import torch
from torch import Tensor

from ple_data.storage.store import Store
from ple_train import stream
from ple_train.objectives import ple_residual
from ple_train.objectives.pair_loss import Knobs, PairLoss, Pairs

RESIDUAL = ple_residual.loss


def center(mean: float) -> PairLoss:
    return lambda pairs, knobs: RESIDUAL(replace(pairs, margin=pairs.margin - mean), knobs)


def split(pairs: Pairs, knobs: Knobs) -> Tensor:
    half = pairs.margin / 2
    residual = torch.stack([-half, half], dim=1) - knobs.beta * pairs.learned
    return 2 / knobs.beta * ple_residual.log_cosh(residual / 2).sum(1)


def importance(pairs: Pairs, knobs: Knobs) -> Tensor:
    """The quantile of y_prompt holds mean log pi_0(y_prompt|p, x), nats a token."""
    log_ratio = pairs.start[:, 1] / pairs.lengths[:, 1] - pairs.quantiles[:, 1]
    return RESIDUAL(pairs, knobs) * log_ratio.clamp(max=0).exp()


def both(pairs: Pairs, knobs: Knobs) -> Tensor:
    return RESIDUAL(pairs, knobs) + pairs.learned.square().sum(1)


def sampled_logp(_: Any, row: dict[str, Any], reward: float) -> float:
    return float(np.mean(row["y_prompt_logps"])) if row["y_prompt_logps"] else 0.0


@contextlib.contextmanager
def in_place(trial: str, data: Path) -> Iterator[None]:
    """Let --objective ple-residual of this process be the trial on the pairs in `data`; "": as it is."""
    losses: dict[str, PairLoss] = {"split": split, "importance": importance, "both": both}
    with contextlib.ExitStack() as stack:
        if trial == "center":
            margins = Store(data).scan("pairs").select(pl.col("s_prompt") - pl.col("s")).collect()
            losses["center"] = center(float(margins.to_numpy().mean()))
        if trial == "importance":
            stack.enter_context(patch.object(stream, "STREAMED", [*stream.STREAMED, "y_prompt_logps"]))
            stack.enter_context(patch.object(stream.PairStream, "_quantile", sampled_logp))
        if trial:
            stack.enter_context(patch.object(ple_residual, "loss", losses[trial]))
        yield
