"""The math on tokens (Eqs. 1, 3, 4, 6; reverse KL): pure functions, tensors in, tensors out.

Every term of the PLE loss is linear in log-probabilities, with one coefficient per response that depends on the
stored row alone (`ple_data.partition` computes it). So the loss is one weighted sum of response log-probabilities.
Reverse KL compares whole distributions. This module never reads rows, never logs, and never holds the logits of more
than one chunk of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_PER_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Logits of a chunk: 8 MiB stay in a processor's cache; a GPU wants large products (256 MiB in float32)."""
ROWS_PER_CHUNK = 64
"""But as many tokens as this at least, whatever the vocabulary: every chunk reads the whole output layer."""


class _TokenLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias)[target], chunk by chunk.

    A token's log-probability depends on its own hidden state alone, so its slope there is known as soon as its logits
    are: forward keeps it [n, d], and backward only scales it. Where the output layer itself is trained, backward
    computes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, softcap: float
    ) -> Tensor:
        needs_hidden, *needs_layer = ctx.needs_input_grad[:3]
        logps = hidden.new_empty(len(targets), dtype=_at_least_float32(hidden))
        slopes = torch.empty_like(hidden) if needs_hidden else None
        weight_used = weight.to(hidden.dtype)
        for rows, logits, log_softmax in _chunks(hidden, weight_used, bias, scale, softcap):
            logps[rows] = log_softmax.gather(1, targets[rows, None]).squeeze(1)
            if slopes is not None:
                slope = _d_logits(logits, log_softmax, targets[rows], scale, softcap)
                torch.mm(slope.to(hidden.dtype), weight_used, out=slopes[rows])
        ctx.save_for_backward(slopes, *((hidden, weight, bias, targets) if any(needs_layer) else ()))
        ctx.scale, ctx.softcap = scale, softcap
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        slopes, *layer = ctx.saved_tensors
        grad_hidden = None if slopes is None else (slopes * grad_logps[:, None]).to(slopes.dtype)
        if not layer:
            return grad_hidden, None, None, None, None, None
        hidden, weight, bias, targets = layer
        grad_weight = (
            weight.new_zeros(weight.shape, dtype=_at_least_float32(weight)) if ctx.needs_input_grad[1] else None
        )
        grad_bias = bias.new_zeros(bias.shape, dtype=_at_least_float32(bias)) if ctx.needs_input_grad[2] else None
        for rows, logits, log_softmax in _chunks(hidden, weight.to(hidden.dtype), bias, ctx.scale, ctx.softcap):
            grad = _d_logits(logits, log_softmax, targets[rows], ctx.scale, ctx.softcap)
            grad.mul_(grad_logps[rows, None])
            grad = grad.to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[rows]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        of_layer = (
            None if grad is None else grad.to(own.dtype) for grad, own in ((grad_weight, weight), (grad_bias, bias))
        )
        return grad_hidden, *of_layer, None, None, None


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """Log-probability of each target token, fused with the output layer.

    hidden [n, d], weight [V, d], targets [n] int64, bias [V] or None → [n], in nats, float32 (float64 for float64
    inputs). logits = scale * (hidden @ weight.T + bias), then softcap * tanh(logits / softcap) when softcap is set.
    Works on `LOGITS_PER_CHUNK` logits (or those of `ROWS_PER_CHUNK` tokens) at a time, forward and backward, in two to
    four buffers of that size. Under autocast the products run in the autocast type. Differentiable once.
    """
    hidden = _in_autocast_type(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        logps: Tensor = _TokenLogps.apply(hidden, weight, bias, targets, scale, softcap)  # type: ignore[no-untyped-call]
    return logps


@torch.no_grad()
def token_entropies(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, scale: float = 1.0, softcap: float = 0.0
) -> Tensor:
    """Entropy of the distribution over the vocabulary at each place, [n] in nats; arguments as of `token_logps`."""
    hidden = _in_autocast_type(hidden)
    entropies = hidden.new_empty(len(hidden), dtype=_at_least_float32(hidden))
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, _, log_softmax in _chunks(hidden, weight.to(hidden.dtype), bias, scale, softcap):
            entropies[rows] = -(log_softmax.exp() * log_softmax).sum(1)
    return entropies


class _ReverseKl(torch.autograd.Function):
    """KL(student || teacher) of the next token, chunk by chunk; slopes as in `_TokenLogps`, of a frozen output layer.

    d KL / d logits of the student = p (log p - log q - KL), p and q being the two distributions.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float
    ) -> Tensor:
        kl = hidden.new_empty(len(hidden), dtype=_at_least_float32(hidden))
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_used = weight.to(hidden.dtype)
        student_and_teacher = (_chunks(states, weight_used, bias, scale, softcap) for states in (hidden, teacher))
        for (rows, logits, log_p), (_, _, log_q) in zip(*student_and_teacher, strict=True):
            terms = log_q.neg_().add_(log_p)
            p = log_p.exp_()
            kl[rows] = terms.mul_(p).sum(1)
            if slopes is not None:
                slope = _through_cap(terms.sub_(p.mul_(kl[rows, None])), logits, scale, softcap)
                torch.mm(slope.to(hidden.dtype), weight_used, out=slopes[rows])
        ctx.save_for_backward(slopes)
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (slopes * grad_kl[:, None]).to(slopes.dtype), None, None, None, None, None


def reverse_kl(
    hidden: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None = None, *, scale: float = 1, softcap: float = 0
) -> Tensor:
    """KL(student || teacher) of the next token over the whole vocabulary, fused with the output layer they share.

    hidden, teacher [n, d]: hidden states of both at the same tokens; weight, bias, scale and softcap as in
    `token_logps` → [n], in nats, at least 0 up to rounding, float32 (float64 for float64 inputs). Works on as many
    logits at a time as `token_logps`, in twice the buffers. Differentiable once, in `hidden` alone: raises ValueError
    where the output layer is trained.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("reverse_kl has no gradient for the output layer: freeze it")
    hidden, teacher = _in_autocast_type(hidden), _in_autocast_type(teacher)
    with torch.autocast(hidden.device.type, enabled=False):
        kl: Tensor = _ReverseKl.apply(hidden, teacher.detach(), weight, bias, scale, softcap)  # type: ignore[no-untyped-call]
    return kl


def sum_by_response(values: Tensor, responses: Tensor, count: int) -> Tensor:
    """Sum token values [n] into their responses (responses [n] int64 in [0, count)) → [count]."""
    return values.new_zeros(count).index_add(0, responses, values)


def weighted_loss(sum_logps: Tensor, coefficients: Tensor, pairs: int) -> Tensor:
    """Eq. 6 (and, through its coefficients, Eqs. 3 and 4) over responses, divided by the pairs of the global batch.

    sum_logps [r]: sum_j log pi(token_j | earlier tokens, x) in nats; coefficients [r]: c from
    `ple_data.partition.partition` → scalar: - sum c * sum_logps / pairs.
    """
    return -(coefficients * sum_logps).sum() / pairs


def sft_loss(logps: Tensor, tokens: int) -> Tensor:
    """Eq. 1 as a mean: - sum of response-token log-probabilities / response tokens of the global batch."""
    return -logps.sum() / tokens


def trust_region(coefficients: Tensor, drift: Tensor, delta: float) -> Tensor:
    """Coefficients with 0 where a response has already drifted more than delta in the direction it is pushed.

    coefficients [r]; drift [r]: mean log-probability now less that of the start policy, nats/token; delta > 0.
    Not in the paper: an option that bounds Eq. 6 below.
    """
    gone = ((coefficients < 0) & (drift < -delta)) | ((coefficients > 0) & (drift > delta))
    return coefficients.masked_fill(gone, 0.0)


def preference_loss(chosen: Tensor, rejected: Tensor, pairs: int) -> Tensor:
    """Bradley-Terry: - sum log sigmoid(r_chosen - r_rejected) / pairs; rewards [n] each → scalar."""
    return -torch.nn.functional.logsigmoid(chosen - rejected).sum() / pairs


def _in_autocast_type(hidden: Tensor) -> Tensor:
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


def _chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, their logits and log softmax [n, V], chunk by chunk in the same three buffers."""
    total, vocabulary = len(hidden), len(weight)
    size = max(1, min(total, max(ROWS_PER_CHUNK, LOGITS_PER_CHUNK[hidden.device.type] // vocabulary)))
    product = hidden.new_empty(size, vocabulary)
    kind = _at_least_float32(hidden)
    exact = product if product.dtype == kind else torch.empty_like(product, dtype=kind)
    log_softmax = torch.empty_like(exact)
    for start in range(0, total, size):
        rows = slice(start, min(start + size, total))
        own = slice(0, rows.stop - start)
        torch.mm(hidden[rows], weight.T, out=product[own])
        logits = exact[own]
        if exact is not product:
            logits.copy_(product[own])
        if bias is not None:
            logits.add_(bias)
        if scale != 1:
            logits.mul_(scale)
        if softcap:
            logits.div_(softcap).tanh_().mul_(softcap)
        yield rows, logits, torch.log_softmax(logits, 1, out=log_softmax[own])


def _d_logits(logits: Tensor, log_softmax: Tensor, targets: Tensor, scale: float, softcap: float) -> Tensor:
    """d log_softmax[target] / d (logits before scale and softcap), [n, V]; it takes the place of log_softmax."""
    grad = log_softmax.exp_().neg_()
    grad.scatter_add_(1, targets[:, None], grad.new_ones(len(targets), 1))
    return _through_cap(grad, logits, scale, softcap)


def _through_cap(grad: Tensor, logits: Tensor, scale: float, softcap: float) -> Tensor:
    """A slope at the logits, carried in place to those before scale and softcap."""
    if softcap:
        grad.mul_(1 - (logits / softcap).square())
    return grad if scale == 1 else grad.mul_(scale)


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
