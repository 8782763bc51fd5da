"""Section c: the output layer and its loss, forward and backward, of ours and of others. Never runs a whole model.

Published elsewhere for a vocabulary of 151,936, a width of 4,096 and 8,192 tokens on an H100: naive 59 ms and 19.9 GiB,
Liger 192 ms and 6.1 GiB, a bare product 42 ms. The goal of ours: at most 80 ms and 6 GiB.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.on_gpu.sections import NotHere, Results, Setting
from benchmarks.on_gpu.timing import device, median_seconds, on_gpu, peak_gib, relative_error, wait

VOCABULARY, WIDTH, TOKENS = 151_936, 4096, 8192
SMALL = (1024, 64, 128)
CHUNKS = (1 << 24, 1 << 25, 1 << 26, 1 << 27, 1 << 28)
"""Logits of a chunk of ours that are tried."""


def measure(results: Results, setting: Setting) -> None:
    vocabulary, width, tokens = SMALL if setting.cpu else (VOCABULARY, WIDTH, TOKENS)
    kind = torch.bfloat16 if on_gpu() else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device(), dtype=kind).requires_grad_()
    weight = torch.randn(vocabulary, width, device=device(), dtype=kind) * width**-0.5
    targets = torch.randint(vocabulary, (tokens,), device=device())
    results.say(vocabulary=vocabulary, width=width, tokens=tokens, kind=str(kind))
    results.attempt("product alone", partial(product, hidden, weight))
    expected = gradient(naive, hidden[:256], weight, targets[:256])
    of_each = partial(forward_and_backward, hidden=hidden, weight=weight, targets=targets, expected=expected)
    for name, loss in WAYS.items():
        results.attempt(name, partial(of_each, loss))
    from ple_train.loss import LOGITS_PER_CHUNK

    usual = LOGITS_PER_CHUNK[hidden.device.type]
    for size in CHUNKS:
        LOGITS_PER_CHUNK[hidden.device.type] = size
        results.attempt(f"ours in chunks of 2^{size.bit_length() - 1}", partial(of_each, ours))
    LOGITS_PER_CHUNK[hidden.device.type] = usual


def product(hidden: Tensor, weight: Tensor) -> dict[str, Any]:
    """The three products of forward and backward would be three times the first, less the weight's gradient."""
    with torch.no_grad():
        once = median_seconds(lambda: hidden @ weight.T)
        gradients = torch.randn(len(hidden), len(weight), device=hidden.device, dtype=hidden.dtype)
        back = median_seconds(lambda: gradients @ weight)
    return {"milliseconds": 1000 * once, "with_backward": 1000 * (once + back)}


def forward_and_backward(
    loss: Callable[..., Tensor], *, hidden: Tensor, weight: Tensor, targets: Tensor, expected: Tensor
) -> dict[str, Any]:
    def work() -> None:
        hidden.grad = None
        loss(hidden, weight, targets).backward()

    work()  # a way that is not here says so, and compiles, before it is measured
    wait()
    error = relative_error(gradient(loss, hidden[:256], weight, targets[:256]), expected)
    gib = peak_gib(work)
    return {"milliseconds": 1000 * median_seconds(work), "gib": gib, "gradient_error": error}


def gradient(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The hidden states' gradient, of a copy."""
    copy = hidden.detach().clone().requires_grad_()
    loss(copy, weight, targets).backward()
    assert copy.grad is not None
    return copy.grad


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from ple_train.loss import token_logps

    return -token_logps(hidden, weight, targets).sum()


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = functional.linear(hidden, weight)
    return -torch.log_softmax(logits.float(), 1).gather(1, targets[:, None]).sum()


def torch_fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    function = getattr(functional, "linear_cross_entropy", None)
    if function is None:
        raise NotHere(f"torch {torch.__version__} has no linear_cross_entropy")
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    more = {"options": options()} if options else {}
    return function(hidden, weight, targets, reduction="sum", **more)


def torch_default(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    if not hasattr(functional, "linear_cross_entropy"):
        raise NotHere(f"torch {torch.__version__} has no linear_cross_entropy")
    return functional.linear_cross_entropy(hidden, weight, targets, reduction="sum")


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    if not importlib.util.find_spec("liger_kernel"):
        raise NotHere("liger_kernel is not installed")
    if not on_gpu():
        raise NotHere("liger_kernel needs a GPU")
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)


WAYS = {
    "ours": ours,
    "naive": naive,
    "torch linear_cross_entropy": torch_default,
    "torch linear_cross_entropy, chunked": torch_fused,
    "liger": liger,
}
