"""Section f: where the time of a training step and of a sampling step goes, and how often the GPU is waited for.

The tables lie as text beside the section's other files; nothing here is timed for comparison, as profiling costs time.
"""

import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import train
from benchmarks.on_gpu import sampling, training
from benchmarks.on_gpu.sections import Results, Setting, room_for
from benchmarks.on_gpu.timing import need_gpu, on_gpu, wait

ROWS = 30
CASES = {"0.5b": training.Case("qwen2.5-0.5b", 1024, 3), "7b": training.Case("qwen2.5-7b", 1024, 3, 4)}
"""One micro-batch each."""
SMALL_CASE = training.Case("small", 12, 16, 1, 4, "--vocabulary 512 --hidden 64")
STEPS, ROWS_AT_ONCE, PROMPT = 8, 64, 128
PLACES = 12
"""Places in the code that wait for the GPU most often, as many as are named."""


def measure(results: Results, setting: Setting) -> None:
    with room_for(4) as folder:
        for name, case in ({"small": SMALL_CASE} if setting.cpu else CASES).items():
            bench = case.bench(folder / f"training-{name}")
            profile_training(results, setting, bench, name)
            bench.clear()
        bench = (SMALL_CASE if setting.cpu else CASES["0.5b"]).bench(folder / "shape")
        train.write_model(folder / "sampling", bench.shape, torch.bfloat16 if on_gpu() else torch.float32)
        bench.clear()
        profile_sampling(results, setting, folder / "sampling", bench.shape["vocab_size"])


def profile_training(results: Results, setting: Setting, bench: train.Bench, name: str) -> None:
    policy = train.our_policy(bench)
    numbers = count()

    def step(delta: float | None = None) -> None:
        train.train_ours(bench, policy, bench.folder / f"output-{next(numbers)}", delta, saved=False)

    results.say(layout=policy.layout, attention=policy.attention)
    step()
    results.attempt(f"{name}: training step", partial(table, step, setting.output / f"f-profile-training-{name}.txt"))
    results.attempt(f"{name}: training step waits", partial(waits, step))
    results.attempt(f"{name}: training step with a trust region waits", partial(waits, partial(step, 0.3)))


def profile_sampling(results: Results, setting: Setting, model: Path, vocabulary: int) -> None:
    engine = sampling.start("hf", model, {})
    work = partial(sample, engine, vocabulary, 2 if setting.cpu else ROWS_AT_ONCE)
    work()
    results.attempt("sampling steps", partial(table, work, setting.output / "f-profile-sampling.txt"))
    results.attempt("sampling steps wait", partial(waits, work))
    engine.close()


def sample(engine: Any, vocabulary: int, rows: int) -> None:
    from ple_data.engines import Sampling

    requests = sampling.requests_of(rows, PROMPT, vocabulary)
    assert len(list(engine.sample(iter([requests]), Sampling(max_new_tokens=STEPS)))) == rows


def table(work: Callable[[], Any], file: Path) -> dict[str, Any]:
    """Operations by their own time, in a text file; the first few of them as numbers."""
    wait()
    began = time.perf_counter()
    work()
    wait()
    alone = time.perf_counter() - began
    with profile(activities=[ProfilerActivity.CUDA if on_gpu() else ProfilerActivity.CPU]) as profiled:
        work()
        wait()
    events = profiled.key_averages()
    device = "device" if on_gpu() else "cpu"
    text = events.table(sort_by=f"self_{device}_time_total", row_limit=ROWS, max_name_column_width=100)
    file.write_text(text + "\n", encoding="utf-8")
    print(text)
    busy = sum(getattr(event, f"self_{device}_time_total") for event in kernels(events)) / 1e6
    launches = sum(event.count for event in events if event.key in ("cudaLaunchKernel", "cuLaunchKernelEx"))
    launches += sum(event.count for event in events if event.key == "cudaLaunchKernelExC")
    return {"seconds_unprofiled": alone, f"{device}_busy_seconds": busy, "launches": launches, "file": file.name}


def kernels(events: Any) -> list[Any]:
    """What ran on the GPU itself, where there is one, so that no time is counted twice."""
    if not on_gpu():
        return list(events)
    ran = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event for event in ran if not getattr(event, "is_user_annotation", False)]


def waits(work: Callable[[], Any]) -> dict[str, Any]:
    """How often the host waits for the GPU, and where."""
    need_gpu()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        "/".join(Path(warning.filename).parts[-2:]) + f":{warning.lineno}"
        for warning in caught
        if "synchroniz" in str(warning.message)
    )
    return {"waits": places.total(), "places": dict(places.most_common(PLACES))}
