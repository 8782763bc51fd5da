"""Seconds and peak memory of a piece of work, on a GPU by its own clock. Never decides what is measured."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.on_gpu.sections import NotHere
from benchmarks.side_by_side import clear_memory, most_memory, peak_bytes

Work = Callable[[], Any]


def on_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cuda" if on_gpu() else "cpu")


def need_gpu() -> None:
    """Raises NotHere."""
    if not on_gpu():
        raise NotHere("needs a GPU")


def wait() -> None:
    """Until the GPU has done what it was given."""
    if on_gpu():
        torch.cuda.synchronize()


def median_seconds(work: Work, repeats: int = 10, warm: int = 3) -> float:
    """Median time of one call."""
    for _ in range(warm):
        work()
    return statistics.median(_once(work) for _ in range(repeats))


def _once(work: Work) -> float:
    wait()
    if not on_gpu():
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    work()
    ended.record()
    wait()
    return began.elapsed_time(ended) / 1000


def peak_gib(work: Work) -> float:
    """The most memory of one call, less what was held before it: of the GPU where there is one."""
    clear_memory()
    held = torch.cuda.memory_allocated() if on_gpu() else peak_bytes()
    work()
    return (most_memory() - held) / 2**30


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of their difference over that of the expected."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())
