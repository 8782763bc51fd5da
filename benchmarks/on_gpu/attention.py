"""Section d: attention over packed sequences, forward and backward: our loop, our one call, flash-attention's.

With the heads of Qwen2.5-7B, and prompts kept once for all their responses or repeated for each. Checks on the way that
the one call gives what the loop gives. Never runs a model.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.on_gpu.sections import NotHere, Results, Setting
from benchmarks.on_gpu.timing import device, median_seconds, need_gpu, on_gpu, peak_gib, relative_error, wait

HEADS, KV_HEADS, SIZE = 28, 4, 128
SMALL_HEADS = (4, 2, 16)
RESPONSES = 2
CASES = {"1,280": (4, 256, 1024), "4,096": (1, 256, 3840), "short": (64, 33, 66)}
"""Queries, and tokens of a prompt and of a response; about 9,000 tokens in all."""
SMALL_CASES = {"short": (3, 5, 9)}
WINDOWS = (None, 512)
NEW_LENGTHS = 16
TOLERANCE = 1e-2
"""Of the relative error, in bfloat16."""

Attend = Callable[..., tuple[Tensor, None]]


def measure(results: Results, setting: Setting) -> None:
    from ple_train.model import attention

    heads = SMALL_HEADS if setting.cpu else (HEADS, KV_HEADS, SIZE)
    kernel = attention.varlen_kernel()
    results.say(heads=heads, kernel=f"{kernel.__module__}.{kernel.__qualname__}" if kernel else None)
    cases = SMALL_CASES if setting.cpu else CASES
    for cudnn in (True, False):
        name = f"torch on a length that is new, {'with' if cudnn else 'without'} cuDNN"
        results.attempt(name, partial(new_lengths, heads, cudnn))
    for case, shape in cases.items():
        for layout in ("shared", "packed"):
            inputs = collate(layout, *shape)
            tensors = random_tensors(inputs["input_ids"].shape[1], *heads)
            for window in WINDOWS:
                name = f"{case}, {layout}: one call is the loop" + (f", window {window}" if window else "")
                results.attempt(name, partial(agree, inputs, tensors, window))
    for case, shape in cases.items():
        for layout in ("shared", "packed"):
            inputs = collate(layout, *shape)
            tensors = random_tensors(inputs["input_ids"].shape[1], *heads)
            for form, attend in {"loop": attention.packed_attention, "one call": attention.varlen_attention}.items():
                call = partial(attend, nn.Module(), *tensors, None, packing=inputs["packing"])
                results.attempt(f"{case}, {layout}: {form}", partial(timed, call, tensors, form == "one call"))
            if layout == "packed":
                results.attempt(f"{case}, packed: flash_attention_2", partial(flash, inputs, tensors))
        results.attempt(f"{case}, rows of one length: torch", partial(rows, shape, heads))


def collate(layout: str, queries: int, prompt: int, response: int) -> dict[str, Any]:
    from ple_train.model.batches import Sequence, collate_packed, collate_shared

    ids = np.zeros(prompt + response, dtype=np.int32)
    sequences = [Sequence(ids, prompt, query=query) for query in range(queries) for _ in range(RESPONSES)]
    collate = collate_shared if layout == "shared" else collate_packed
    return collate(sequences, device()).inputs


def random_tensors(tokens: int, heads: int, kv_heads: int, size: int, rows: int = 1) -> list[Tensor]:
    """Query, key and value."""
    kind = torch.bfloat16 if on_gpu() else torch.float32
    torch.manual_seed(0)
    shapes = [(rows, number, tokens, size) for number in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, device=device(), dtype=kind).requires_grad_() for shape in shapes]


def agree(inputs: dict[str, Any], tensors: list[Tensor], window: int | None) -> dict[str, Any]:
    """Raises AssertionError where one call and the loop differ by more than the rounding."""
    from ple_train.model.attention import packed_attention, varlen_attention

    need_gpu()
    kinds = (varlen_attention, packed_attention)
    found, expected = (answers(attend, inputs["packing"], tensors, window) for attend in kinds)
    names = ("output", "query", "key", "value")
    errors = {name: relative_error(*pair) for name, *pair in zip(names, found, expected, strict=True)}
    assert max(errors.values()) < TOLERANCE, errors
    return errors


def answers(attend: Attend, packing: Any, tensors: list[Tensor], window: int | None) -> list[Tensor]:
    """The output, and the gradients of query, key and value under a random gradient of the output."""
    output, _ = attend(nn.Module(), *tensors, None, packing=packing, sliding_window=window)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output.detach(), *torch.autograd.grad(output, tensors, gradient)]


def timed(call: Callable[[], tuple[Tensor, None]], tensors: list[Tensor], gpu_only: bool = False) -> dict[str, Any]:
    if gpu_only:
        need_gpu()
    gradient = torch.ones_like(call()[0])

    def both() -> None:
        torch.autograd.grad(call()[0], tensors, gradient)

    forward = median_seconds(lambda: call()[0].detach(), 5)
    return {"ms_forward": 1000 * forward, "ms_both": 1000 * median_seconds(both, 5), "gib": peak_gib(both)}


def flash(inputs: dict[str, Any], tensors: list[Tensor]) -> dict[str, Any]:
    """transformers' way to the flash-attn package."""
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        raise NotHere("flash-attn is not installed")
    module = SimpleNamespace(is_causal=True, config=SimpleNamespace(_attn_implementation="flash_attention_2"))
    borders = {name: value for name, value in inputs.items() if name.startswith(("cu_seq", "max_length"))}
    return timed(partial(flash_attention_forward, module, *tensors, None, **borders), tensors)


def new_lengths(heads: tuple[int, int, int], cudnn: bool) -> dict[str, Any]:
    """Median time of forward and backward where no two calls are of one length, causal and with a mask."""
    need_gpu()
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    seconds: dict[str, list[float]] = {"causal": [], "mask": []}
    try:
        for length in range(700, 700 + 8 * NEW_LENGTHS, 8):
            q, k, v = random_tensors(length, *heads, rows=4)
            mask = torch.ones(4, 1, length, length, dtype=torch.bool, device=q.device).tril()
            for name, how in {"causal": {"is_causal": True}, "mask": {"attn_mask": mask}}.items():
                wait()
                began = time.perf_counter()
                out = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)
                torch.autograd.grad(out.sum(), (q, k, v))
                wait()
                seconds[name].append(time.perf_counter() - began)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    return {f"ms_{name}": 1000 * statistics.median(found) for name, found in seconds.items()} | {"was_on": before}


def rows(shape: tuple[int, int, int], heads: tuple[int, int, int]) -> dict[str, Any]:
    """What torch needs where nothing is packed: as many rows, all of one length, causal."""
    queries, prompt, response = shape
    tensors = random_tensors(prompt + response, *heads, rows=RESPONSES * queries)

    def call() -> tuple[Tensor, None]:
        return nn.functional.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True), None

    return timed(call, tensors)
