"""Section a: every command on small models of real architecture, on the GPU, beside the CPU's results in float32.

First whether a GPU is there, multiplies, and trains one step; then the rest. A step that fails keeps its traceback and
the next one goes on. The CPU's side and the killed processes run beside the GPU's.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import train
from benchmarks.on_gpu import kills, reference
from benchmarks.on_gpu.reference import call
from benchmarks.on_gpu.sections import Results, Setting, room_for
from benchmarks.on_gpu.timing import need_gpu, on_gpu
from benchmarks.on_gpu.worlds import World, make_world

BF16_TOLERANCE = 0.05
"""Of a step's loss in bf16, over the largest loss in float32."""
BF16_STEPS = 12
"""Steps that are compared: rounding adds up over more."""


def measure(results: Results, setting: Setting) -> None:
    results.attempt("machine", machine)
    results.attempt("what the driver says of memory", driver)
    with room_for(3) as folder, ThreadPoolExecutor(6) as threads:
        kinds: dict[str, Path | None] = {"llama": None, "qwen2": None}
        if setting.model:
            kinds["given"] = setting.model
        worlds = []
        for kind, given in kinds.items():
            if world := begin(results, setting, kind, folder / kind, given):
                worlds.append(world)
        if not worlds:
            raise RuntimeError("no world could be sampled and scored: nothing else can run")
        first = worlds[0]
        beside: dict[str, Future[Any]] = {
            "ple-train killed and resumed": threads.submit(kills.train_again, first),
            "ple run killed and resumed": threads.submit(kills.run_again, first),
        }
        whole = worlds[:1] if setting.cpu else worlds
        cpu_sides = {world.name: threads.submit(cpu_reference, world, setting.output) for world in whole}
        for world in worlds:
            few = None if world in whole else ("train",)
            for name, words in reference.commands(world, "gpu").items():
                if not few or name in few:
                    results.attempt(f"{world.name}: {name}, float32", partial(call, words))
            for name, work in on_gpu_alone(world).items() if not few else ():
                results.attempt(f"{world.name}: {name}", work)
        for world in whole:
            results.attempt(f"{world.name}: the CPU's side", cpu_sides[world.name].result)
            for name in reference.commands(world, "gpu"):
                work = partial(reference.compare, name, world)
                results.attempt(f"{world.name}: {name} as on the CPU", work)
        for name, future in beside.items():
            results.attempt(f"{first.name}: {name}", future.result)
        alike = partial(kills.same_as_unkilled, first)
        results.attempt(f"{first.name}: ple-train resumed as if never killed", alike)


def machine() -> dict[str, Any]:
    """That a product comes out right, before anything is built on it."""
    if not on_gpu():
        return {"device": "cpu"}
    left, right = (torch.randn(256, 256, device="cuda") for _ in range(2))
    error = float((left @ right - (left.cpu() @ right.cpu()).cuda()).abs().max())
    assert error < 1e-3, error
    free, total = torch.cuda.mem_get_info()
    return {
        "device": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability()),
        "free_gib": free / 2**30, "total_gib": total / 2**30, "cuda": torch.version.cuda,
        "bf16_tflops": train.product_rate(torch.bfloat16, 8192) / 1e12,
    }  # fmt: skip


def driver() -> dict[str, Any]:
    """Whether `ple run` learns from the driver what a stage holds: 2 GiB are taken and given back."""
    from ple_train.run.gpu_watch import GpuWatch

    need_gpu()
    with GpuWatch() as watch:
        watch.begin()
        held = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
        time.sleep(1)
        del held
        torch.cuda.empty_cache()
        most, left = watch.end()
    assert most, "nvidia-smi said nothing, or not soon enough"
    return {"most_gib": max(most.values()) / 2**30, "left_gib": max(left.values(), default=0) / 2**30}


def begin(results: Results, setting: Setting, kind: str, folder: Path, given: Path | None) -> World | None:
    """The world with its sampled and scored store, after one step of training in this process; None where it fails."""
    made: list[World] = []

    def make() -> None:
        made.append(make_world(kind, folder, small=setting.cpu, given=given))

    if not results.attempt(f"{kind}: written", make):
        return None
    world = made[0]
    for precision in ("bf16", "float32"):
        results.attempt(f"{kind}: one step, {precision}", partial(one_step, world, precision))
    gen = partial(call, gen_words(world, world.data, 0))
    judged = partial(call, ["score", "--data", world.data, "--reward-model", world.reward])
    verified = partial(call, ["verify", world.data])
    steps = {"gen": gen, "score": judged, "verify": verified}
    return world if all(results.attempt(f"{kind}: {name}", work) for name, work in steps.items()) else None


def gen_words(world: World, data: str, round: int, *more: str) -> list[str]:
    words = ["gen", "--queries", world.file("queries"), "--principles", "hh", "--data", data, "--engine", "hf"]
    policy = more if "--model" in more else ("--model", world.model, *more)
    return [*words, "--round", str(round), "--max-new-tokens", str(world.new_tokens), "--unit-size", "16", *policy]


def one_step(world: World, precision: str) -> dict[str, Any]:
    """Forward and backward of two responses to one prompt; which attention and layout were taken."""
    from ple_train.model.batches import Sequence
    from ple_train.model.policy import load_policy

    policy = load_policy(world.model, precision=precision)
    ids = np.arange(3, 19, dtype=np.int32)
    tokens = policy.collate([Sequence(ids, 4, query=0), Sequence(ids + 1 - (ids < 7), 4, query=0)])
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = -policy(tokens).sum()
    loss.backward()
    norms = [float(p.grad.norm()) for p in policy.trainable().values() if p.grad is not None]
    assert np.isfinite(loss.item()), loss
    assert np.isfinite(norms).all(), norms
    assert max(norms) > 0, norms
    return {"attention": policy.attention, "layout": policy.layout, "loss": loss.item()}


def cpu_reference(world: World, output: Path) -> dict[str, Any]:
    """The CPU's side in a process of its own that sees no GPU."""
    command = [sys.executable, "-m", "benchmarks.on_gpu.reference", json.dumps(dataclasses.asdict(world), default=str)]
    log = output / f"a-runs-cpu-{world.name}.log"
    with log.open("wb") as file:
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 4))}  # the others want some, too
        environment = threads | os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        code = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
    if code:
        raise RuntimeError(f"it ended with {code}:\n{kills.end_of(log)}")
    return {"log": log.name}


def on_gpu_alone(world: World) -> dict[str, Callable[[], Any]]:
    """What has no counterpart on the CPU: other precisions, ways to compute, and what follows a first round."""
    out = world.folder / "gpu"
    base = ["train", "--model", world.model, "--data", world.data, "--round", "0", "--batch-size", "4"]
    bf16 = ["--precision", "bf16"]
    safe = ["--trust-region", "0.3", "--normalize-wsft", "--gradient-checkpointing"]
    trainings = {
        "train, bf16": [*bf16, "--epochs", "2"],
        "train, bf16, trust region, gradient checkpointing": [*bf16, *safe],
        "train, float32, gradient checkpointing": ["--precision", "float32", *safe],
        "train, bf16, the loop": [*bf16, "--attention", "ple_packed"],
        "train, bf16, padded rows": [*bf16, "--attention", "sdpa"],
        "train, bf16, eager": [*bf16, "--attention", "eager"],
        "train, bf16, all weights": [*bf16, "--full"],
    }
    steps: dict[str, Callable[[], Any]] = {
        name: partial(trained, [*base, *more, "--output", str(out / name)], out / name)
        for name, more in trainings.items()
    }
    steps["bf16 near float32"] = partial(near, out / "train, bf16", out / "train")
    sft = ["sft", "--model", world.model, "--data", world.file("sft"), *bf16, "--batch-size", "4"]
    steps["sft, bf16, merged"] = partial(trained, [*sft, "--output", str(out / "merged")], out / "merged")
    steps["gen with the merged model"] = partial(
        call, gen_words(world, f"{out}/merged-data", 0, "--model", f"{out}/merged")
    )
    labels = ["reward", "--model", world.model, "--data", world.file("labels"), *bf16, "--batch-size", "4"]
    steps["reward, labels, bf16"] = partial(trained, [*labels, "--output", str(out / "labels")], out / "labels")
    adapter = ["--adapter", str(out / "train, bf16")]
    judge = ["score", "--data", world.data, "--reward-model", world.reward]
    halved = [*judge, "--reward-dtype", "bfloat16", "--output", f"{out}/score in bf16"]
    steps["score, bf16"] = partial(call, halved)
    steps["round 1: gen"] = partial(call, gen_words(world, world.data, 1, *adapter))
    steps["round 1: score"] = partial(call, judge)
    again = ["train", "--model", world.model, *adapter, "--data", world.data, "--round", "1", *bf16, *safe]
    steps["round 1: train"] = partial(trained, [*again, "--output", str(out / "again")], out / "again")
    evaluation = [
        "eval", "--policy", f"start={world.model}", "--policy", f"ple={world.model},{out}/train, bf16",
        "--queries", world.file("queries"), "--limit", "8", "--engine", "hf", "--max-new-tokens", "4",
        "--reward-model", world.reward, "--output", str(out / "sampled"),
    ]  # fmt: skip
    steps["eval, sampled, bf16"] = partial(call, evaluation)
    return steps


def trained(words: list[str], output: Path) -> dict[str, Any]:
    """Raises AssertionError where a step's loss is not finite."""
    call(words)
    losses = reference.losses(output)
    assert np.isfinite(losses).all(), losses
    return {"steps": len(losses), "first_loss": float(losses[0]), "last_loss": float(losses[-1])}


def near(bf16: Path, float32: Path) -> dict[str, Any]:
    """The loss of the first steps, over the largest. Raises AssertionError."""
    found, expected = (reference.losses(output) for output in (bf16, float32))
    steps = min(len(found), BF16_STEPS)
    found, expected = found[:steps], expected[:steps]
    apart = float(np.abs(found - expected).max() / np.abs(expected).max())
    assert apart <= BF16_TOLERANCE, (apart, found.tolist(), expected.tolist())
    return {"apart": apart}
