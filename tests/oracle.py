"""The method's math in plain Python floats (float64), written from the equations alone: what our code is
held against.

Imports nothing but `math`: neither polars nor torch nor anything of ours.
"""

import math
from dataclasses import dataclass


def tau(tau0: float, alpha: float, t: int) -> float:
    """Eq. 7, step by step: tau_t = tau_{t-1} * alpha, starting from tau0 at t = 0."""
    value = tau0
    for _ in range(t):
        value *= alpha
    return value


def weights(s: float, s_prompt: float) -> tuple[float, float]:
    """Eq. 5 as printed, w = 2 e^s / (e^s + e^s_prompt) - 1, with the larger exponent divided out so that it
    is finite.
    """
    top = max(s, s_prompt)
    a, b = math.exp(s - top), math.exp(s_prompt - top)
    return 2 * a / (a + b) - 1, 2 * b / (a + b) - 1


@dataclass(frozen=True)
class Row:
    """What the partition says of one pair."""

    margin: float
    set: str
    w: float
    w_prompt: float
    c: float
    c_prompt: float


def row(
    s: float,
    s_prompt: float,
    length: int,
    length_prompt: int,
    tau: float,
    *,
    normalize_wsft: bool = False,
    anchor: float = 0.0,
    without: str | None = None,
) -> Row:
    """Set and coefficients of one pair (Eqs. 3-5); lengths are in response tokens. Without `rank` all pairs are
    weighted SFT, without `wsft` those that are not in the rank set weigh nothing.
    """
    margin = s_prompt - s
    w, w_prompt = weights(s, s_prompt)
    if margin > tau and without != "rank":
        kind, c, c_prompt = "rank", -_divided(1, length), _divided(1, length_prompt)
    elif without == "wsft":
        kind, c, c_prompt = "wsft", 0.0, 0.0
    elif normalize_wsft:
        kind, c, c_prompt = "wsft", _divided(w, length), _divided(w_prompt, length_prompt)
    else:
        kind, c, c_prompt = "wsft", w, w_prompt
    if margin > 0:
        c_prompt += _divided(anchor, length_prompt)
    if margin < 0:
        c += _divided(anchor, length)
    return Row(margin, kind, w, w_prompt, c, c_prompt)


def _divided(value: float, length: int) -> float:
    return value / length if length else 0.0


def pair_loss(s: float, s_prompt: float, logps: list[float], logps_prompt: list[float], tau: float) -> float:
    """The loss of one pair (Eqs. 3, 4, 6), given log pi(y^j | y^<j, x) and log pi(y_prompt^j | ..., x) of
    each token.
    """
    if s_prompt - s > tau:
        return -(_mean(logps_prompt) - _mean(logps))  # Eq. 3
    w, w_prompt = weights(s, s_prompt)
    return -(w * sum(logps) + w_prompt * sum(logps_prompt))  # Eq. 4


def batch_loss(pairs: list[tuple[float, float, list[float], list[float]]], tau: float) -> float:
    """Eq. 6 over (s, s_prompt, logps, logps_prompt) of each pair, divided by the number of pairs."""
    return math.fsum(pair_loss(*pair, tau) for pair in pairs) / len(pairs)


def sft_loss(logps: list[list[float]]) -> float:
    """Eq. 1 over the response tokens of each sequence: minus the sum, not divided by anything."""
    return -math.fsum(sum(sequence) for sequence in logps)


def reverse_kl(student: list[float], teacher: list[float]) -> float:
    """KL(student || teacher) = sum p log(p / q) of one token, from the logits of both over the whole vocabulary."""
    log_p, log_q = _log_softmax(student), _log_softmax(teacher)
    return math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))


def _log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = top + math.log(math.fsum(math.exp(logit - top) for logit in logits))
    return [logit - total for logit in logits]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
