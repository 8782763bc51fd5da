"""What a training cost: tokens sampled for it, tokens trained on, seconds. So that methods are compared at equal cost.

It never reads data; the metrics of the steps and what was sampled are handed in.
"""

from __future__ import annotations

from typing import Any


def training_cost(
    history: list[dict[str, Any]], *, sampled: int, reused: int = 0, trained: int | None = None
) -> dict[str, float]:
    """The record of a finished training: `cost` in ple.json.

    tokens_sampled: response tokens that were sampled for this round and this method, whether trained on or not.
    tokens_reused: those of earlier rounds that it used again. tokens_trained: response tokens with a weight in
    the loss, counted once a pass (`trained`, else the sum over the steps). seconds: of all steps, across
    restarts, without loading and saving.
    """
    return {
        "tokens_sampled": int(sampled),
        "tokens_reused": int(reused),
        "tokens_trained": int(sum(step["trained_tokens"] for step in history) if trained is None else trained),
        "seconds": round(sum(step["seconds"] for step in history), 3),
    }


def describe_cost(cost: dict[str, float]) -> str:
    """One line for a person."""
    reused = f" ({cost['tokens_reused']:,} more from earlier rounds)" if cost["tokens_reused"] else ""
    return (
        f"{cost['tokens_sampled']:,} tokens sampled{reused}, {cost['tokens_trained']:,} trained on, "
        f"{cost['seconds']:.1f} s"
    )
