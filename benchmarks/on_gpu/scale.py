"""Section g: what several GPUs and machines are for, on the GPUs that there are: --workers, --shard, --endpoint.

With one GPU a worker of Ray has it, a second one is refused, and training in parts is in one part: the same code, over
NCCL. Rows and losses are those of one process. Without a GPU there are two workers and two parts, over gloo.
"""

import importlib.util
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.on_gpu.kills import end_of
from benchmarks.on_gpu.reference import call, distance, losses, read, weights_apart
from benchmarks.on_gpu.runs import gen_words
from benchmarks.on_gpu.sections import NotHere, Results, Setting, room_for
from benchmarks.on_gpu.timing import on_gpu
from benchmarks.on_gpu.worlds import World, make_world

EQUAL = 1e-5
"""Most that a loss of training in parts may differ by in float32, over the largest."""


def measure(results: Results, setting: Setting) -> None:
    count = torch.cuda.device_count() if on_gpu() else 2
    results.say(gpus=torch.cuda.device_count() if on_gpu() else 0)
    with room_for(1) as folder:
        world = make_world("llama", folder / "llama", small=setting.cpu)
        sampled = results.attempt("gen", partial(call, gen_words(world, world.data, 0)))
        judge = ["score", "--reward-model", world.reward, "--data", world.data]
        if not (sampled and results.attempt("score", partial(call, judge))):
            raise RuntimeError("nothing could be sampled and scored: nothing else can run")
        for precision in ("float32",) if setting.cpu else ("float32", "bf16"):
            results.attempt(
                f"--shard over {count}, {precision}", partial(shard, world, count, precision, setting.output)
            )
        results.attempt(f"gen --workers {count}", partial(workers, world, count))
        results.attempt(f"score --workers {count}", partial(judges, world, count))
        if on_gpu():
            results.attempt(f"gen --workers {count + 1} is refused", partial(refused, world, count + 1))
        results.attempt("gen --endpoint", partial(endpoint, world, setting.output / "g-scale-server.log"))


def shard(world: World, count: int, precision: str, output: Path) -> dict[str, Any]:
    """A training by `count` processes in parts beside one by one process. Raises AssertionError."""
    out = world.folder / precision
    base = ["train", "--model", world.model, "--data", world.data, "--round", "0", "--batch-size", "4"]
    base += ["--precision", precision, "--trust-region", "0.3", "--normalize-wsft", "--gradient-checkpointing"]
    call([*base, "--output", f"{out}/whole"])
    words = [*base, "--shard", "--output", f"{out}/parts"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
    own = "benchmarks.on_gpu.scale" if count == 1 else "cli"
    log = output / f"g-scale-shard-{precision}.log"
    with log.open("wb") as file:
        code = subprocess.run([sys.executable, *torchrun, own, *words], stdout=file, stderr=file).returncode
    if code:
        raise RuntimeError(f"it ended with {code}:\n{end_of(log)}")
    whole, parts = losses(out / "whole"), losses(out / "parts")
    apart = float(np.abs(whole - parts).max() / np.abs(whole).max())
    assert apart <= (EQUAL if precision == "float32" else 0.05), (apart, whole.tolist(), parts.tolist())
    moved = float(np.quantile(weights_apart(out / "whole", out / "parts"), 0.9999))
    return {"steps": len(whole), "losses_apart": apart, "weights_apart": moved}


def in_one_part() -> None:
    """`ple WORDS` as the only process of a torchrun, in parts nevertheless: what would be taken for no parts at all."""
    import cli
    from ple_train.model import shard

    if on_gpu():
        torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl" if on_gpu() else "gloo")  # accelerate makes none for one process
    shard.is_shared = torch.distributed.is_initialized
    cli.ple.main(sys.argv[1:], prog_name="ple")


def workers(world: World, count: int) -> dict[str, Any]:
    """Rows of workers beside those of one process. Raises AssertionError, NotHere."""
    need("ray")
    data = str(world.folder / "by-workers")
    began = time.perf_counter()
    call([*gen_words(world, data, 0), "--workers", str(count)])
    seconds = time.perf_counter() - began
    return {"rows": same_rows(world, data), "seconds_with_start": seconds}


def same_rows(world: World, data: str) -> int:
    keys = ["query_id", "sample"]
    own, found = (read(Path(where), "responses/**/*.parquet", keys) for where in (world.data, data))
    ids = [column for column in own.columns if column.endswith("_ids")]
    assert ids, own.columns
    assert own.select(keys + ids).equals(found.select(keys + ids)), "the rows are others"
    return int(own.height)


def judges(world: World, count: int) -> dict[str, Any]:
    """Rewards of workers beside those of one process. Raises AssertionError, NotHere."""
    need("ray")
    output = world.folder / "scored-by-workers"
    words = ["score", "--reward-model", world.reward, "--data", world.data, "--output", str(output)]
    call([*words, "--workers", str(count)])
    keys = ["query_id", "sample"]
    own, found = (read(where, "pairs/**/*.parquet", keys) for where in (Path(world.data), output))
    apart = max(distance(own[name].to_numpy(), found[name].to_numpy()) for name in ("s", "s_prompt"))
    assert apart <= EQUAL, apart
    return {"rows": int(found.height), "apart": apart}


def refused(world: World, count: int) -> dict[str, Any]:
    """More workers than GPUs end in one sentence. Raises AssertionError, NotHere."""
    need("ray")
    words = [*gen_words(world, str(world.folder / "too-many"), 0), "--workers", str(count)]
    began = time.perf_counter()
    ended = subprocess.run([sys.executable, "-m", "cli", *words], capture_output=True, text=True)
    assert ended.returncode == 2, (ended.returncode, ended.stderr)
    said = ended.stderr.strip().splitlines()[-1]
    assert "there is room for" in said, said
    return {"said": said, "seconds_with_start": time.perf_counter() - began}


def endpoint(world: World, log: Path) -> dict[str, Any]:
    """Rows by way of a vLLM server. Raises NotHere."""
    need("vllm")
    need("pytest")
    from tests.vllmserver import VllmServer

    data = str(world.folder / "by-server")
    server = VllmServer(sys.executable, log, "--model", world.model, "--gpu-memory-utilization", "0.3")
    try:
        server.start()
        server.wait()
        call([*gen_words(world, data, 0), "--engine", "server", "--endpoint", server.address])
    finally:
        server.kill()
    found = read(Path(data), "responses/**/*.parquet", ["query_id", "sample"])
    return {"rows": int(found.height)}


def need(package: str) -> None:
    """Raises NotHere."""
    if importlib.util.find_spec(package) is None:
        raise NotHere(f"{package} is not installed")


if __name__ == "__main__":
    in_one_part()
