"""Contenders timed in turns, and their ratios with the spread: what every benchmark here prints."""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def seconds_of(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def timed_in_turns(contenders: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each contender (a function that gives its own seconds), once to warm up, then in alternating order."""
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats):
        for name in contenders if repeat % 2 == 0 else reversed(list(contenders)):
            seconds[name].append(contenders[name]())
    return seconds


def ratio_table(seconds: Mapping[str, list[float]], amount: float, unit: str) -> str:
    """A line a contender: its rate, and how many times longer than the first it took (median, least and most)."""
    first, *_ = names = list(seconds)
    lines = [f"{'':16} {unit + '/s':>16}   time / time of {first} (median [least, most] of {len(seconds[first])})"]
    for name in names:
        ratios = sorted(other / own for own, other in zip(seconds[first], seconds[name], strict=True))
        rate = amount / statistics.median(seconds[name])
        lines.append(f"{name:16} {rate:16,.0f}   {statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]")
    return "\n".join(lines)


def made_with(*packages: str) -> str:
    """The machine and the versions of `packages` that are here: without them a figure says nothing."""
    return ", ".join((machine(), *(f"{name} {version(name)}" for name in packages if find_spec(name))))


def machine() -> str:
    """Processor, its widest vector instructions, cores and GPU (Linux)."""
    facts = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    names = {name.strip(): value.split() for name, value in facts.items()}
    widest = next((kind for kind in ("amx_bf16", "avx512f", "avx2") if kind in names.get("flags", ())), "")
    model = " ".join(names.get("model name", [platform.machine()]))
    return f"{os.cpu_count()} cores {model} {widest}{gpu()}".strip()


def gpu() -> str:
    """The GPU's name behind a comma, where torch finds one."""
    import torch

    return f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""


def peak_bytes() -> int:
    """The most resident memory that this process has held (Linux)."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def clear_memory() -> None:
    """Give back what is not in use; `most_memory` counts from here."""
    import torch

    gc.collect()
    if not torch.cuda.is_available():
        forget_peak()
        return
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def most_memory() -> int:
    """The most bytes held so far: of the GPU where there is one, else of the process."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes()


def forget_peak() -> None:
    """Let `peak_bytes` count from here (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
