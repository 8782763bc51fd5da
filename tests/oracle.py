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


# Objectives beside the printed loss: each the loss of one pair and its slopes by log pi of y and of y_prompt.
# d, d_prompt: log pi - log pi_0 of a response, already divided by its length where the form is means.


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))


def residual(margin: float, d: float, d_prompt: float, tau: float, beta: float) -> tuple[float, float, float]:
    """The pull (1 above tau, tanh(m / 2) below) added up from where the pair rests, by Simpson's rule."""

    def pull(m: float) -> float:
        return math.tanh(m / 2)

    def area(end: float) -> float:
        steps = 2000
        width = end / steps
        ends = pull(0) + pull(end)
        inner = sum((4 if n % 2 else 2) * pull(n * width) for n in range(1, steps))
        return (ends + inner) * width / 3

    m = margin - beta * (d_prompt - d)
    value = area(m) if m <= tau else area(tau) + (m - tau)
    slope = 1.0 if m > tau else pull(m)
    return value / beta, slope, -slope


def dpo(margin: float, d: float, d_prompt: float, beta: float, wrong: float) -> tuple[float, float, float]:
    if margin == 0:
        return 0.0, 0.0, 0.0
    sign = math.copysign(1, margin)
    h = beta * sign * (d_prompt - d)
    value = -(1 - wrong) * math.log(sigmoid(h)) - wrong * math.log(sigmoid(-h))
    slope = (-(1 - wrong) * sigmoid(-h) + wrong * sigmoid(h)) * beta * sign
    return value, -slope, slope


def ipo(margin: float, d: float, d_prompt: float, beta: float) -> tuple[float, float, float]:
    if margin == 0:
        return 0.0, 0.0, 0.0
    sign = math.copysign(1, margin)
    error = sign * (d_prompt - d) - 1 / (2 * beta)
    return error**2, -2 * error * sign, 2 * error * sign


def rebel(margin: float, d: float, d_prompt: float, beta: float) -> tuple[float, float, float]:
    error = beta * (d_prompt - d) - margin
    return error**2, -2 * error * beta, 2 * error * beta


def apo(margin: float, d: float, d_prompt: float, beta: float) -> tuple[float, float, float]:
    if margin == 0:
        return 0.0, 0.0, 0.0
    better, worse = (d_prompt, d) if margin > 0 else (d, d_prompt)
    value = 1 - sigmoid(beta * better) + sigmoid(beta * worse)
    up = -beta * sigmoid(beta * better) * (1 - sigmoid(beta * better))
    down = beta * sigmoid(beta * worse) * (1 - sigmoid(beta * worse))
    return value, (down if margin > 0 else up), (up if margin > 0 else down)


def topr(margin: float, d: float, d_prompt: float) -> tuple[float, float, float]:
    value, slopes = 0.0, []
    for advantage, ratio in ((-margin / 2, d), (margin / 2, d_prompt)):
        tapered = ratio if ratio > 0 else math.exp(ratio) - 1
        value -= advantage * (ratio if advantage > 0 else tapered)
        slopes.append(-advantage * (1 if advantage > 0 else min(1.0, math.exp(ratio))))
    return value, slopes[0], slopes[1]


def qrpo(q: float, q_prompt: float, d: float, d_prompt: float, beta: float) -> tuple[float, float, float]:
    log_partition = math.log(beta * (math.exp(1 / beta) - 1))
    errors = [quantile - beta * log_partition - beta * ratio for quantile, ratio in ((q, d), (q_prompt, d_prompt))]
    return sum(error**2 for error in errors), -2 * beta * errors[0], -2 * beta * errors[1]


# Rewards: how often one is right, and several put together.


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def right(chosen: float, rejected: float) -> float:
    if chosen == rejected:
        return 0.5
    return 1.0 if chosen > rejected else 0.0


def normalized(values: list[float]) -> list[float]:
    """Each less the mean of all, divided by their standard deviation (of all, not of a sample); 0 where all agree."""
    middle = mean(values)
    deviation = math.sqrt(math.fsum((value - middle) ** 2 for value in values) / len(values))
    return [(value - middle) / deviation if max(values) > min(values) else 0.0 for value in values]


def together(rule: str, numbers: list[float], s: list[float], s_prompt: list[float]) -> tuple[float, float]:
    """s and s_prompt of one pair from those of each reward; numbers: the weights, or the tolerance."""
    if rule == "lexicographic":
        for a, b in zip(s, s_prompt, strict=True):
            if abs(b - a) > numbers[0]:
                return a, b
        return s[-1], s_prompt[-1]
    if rule == "min":
        return min(s), min(s_prompt)
    weights = numbers if rule == "weighted" else [1 / len(s)] * len(s)
    a, b = (math.fsum(w * value for w, value in zip(weights, arm, strict=True)) for arm in (s, s_prompt))
    return a, b
