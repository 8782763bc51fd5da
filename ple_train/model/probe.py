"""Which layout a model keeps: the model itself is asked, on a few short sequences, before it trains.

A layout is kept when the log-probabilities are those of the model alone, when a response that changes moves nobody
but itself, and when a prompt that changes moves all of its responses and nobody else. The last two are compared with
padded rows, where no sequence can see another, so they also find a leak where a fresh model's logits are too flat to
show one. Says yes or no; it never sets anything.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ple_train.model.batches import Sequence

TOLERANCE = {"float32": 1e-4, "bf16": 0.03}
"""Mean difference from the model's own log-probabilities that is forgiven, over their mean size: rounding grows with
what is rounded. Ids at random have log-probabilities of -15 in real models; bfloat16 moved them by 0.03 to 0.16 nats
(SmolLM2-135M, Qwen2.5-0.5B, by way of attention), where a context is worth 1.4."""
STILL = 1e-6
"""Movement in nats of a response that nothing should have moved, beyond twice that in padded rows."""
PROMPT, RESPONSE, SIBLING, OTHER = 3, 9, 6, 5
"""Tokens of the shared prompt, of the two responses to it, and of the response to another prompt of two tokens."""

Ask = Callable[[list[Sequence]], Tensor]
"""Sequences → log-probabilities of all their response tokens, [n] in nats."""


def answers(ask: Ask, vocabulary: int) -> Tensor:
    """Log-probabilities [3, n] of two responses to one query and one to another: as they are, with other ids in the
    first response, and with other ids in the shared prompt."""
    return torch.stack([ask(sequences(vocabulary, change)).float().cpu() for change in ("", "response", "prompt")])


def sequences(vocabulary: int, change: str = "") -> list[Sequence]:
    """The probe's sequences; with `change`, other ids in the first `response` or in the shared `prompt`."""
    ids = np.random.default_rng(0).integers(0, vocabulary, PROMPT + RESPONSE + SIBLING + 2 + OTHER).astype(np.int32)
    prompt, response, sibling, other = np.split(ids, np.cumsum([PROMPT, RESPONSE, SIBLING]))
    if change == "prompt":
        prompt = (prompt + 1) % vocabulary
    if change == "response":
        response = (response + 1) % vocabulary
    behind = [np.concatenate([prompt, text]) for text in (response, sibling)]
    return [*(Sequence(both, PROMPT, query=0) for both in behind), Sequence(other, 2, query=1)]


def agree(found: Tensor, expected: Tensor, precision: str) -> bool:
    """Whether log-probabilities are the same up to the rounding of the precision."""
    return bool((found - expected).abs().mean() <= TOLERANCE[precision] * expected.abs().mean())


def keeps_apart(found: Tensor, padded: Tensor) -> bool:
    """Whether answers [3, n] show no sequence that sees another, or that does not see its own prompt."""
    moved, expected = (kind[1:] - kind[0] for kind in (found, padded))
    still = torch.ones_like(moved, dtype=torch.bool)
    still[0, :RESPONSE] = False
    still[1, : RESPONSE + SIBLING] = False
    if moved[still].abs().max() > 2 * expected[still].abs().max() + STILL:
        return False
    seeing = [(1, slice(1, RESPONSE)), (1, slice(RESPONSE + 1, RESPONSE + SIBLING))]  # first tokens: from the prompt
    return all(bool(moved[at].abs().mean() >= expected[at].abs().mean() / 2) for at in seeing)
