"""Real processes, killed with -9 after their first checkpoint and run again: what a GPU changes in that, if anything.

Each function gives what it saw and raises where the second run does not end well. Waits only for what it started.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.on_gpu.reference import TOLERANCE, trained, training
from benchmarks.on_gpu.worlds import World

PATIENCE = 240.0
"""Seconds in which a first checkpoint must appear."""


def program(name: str) -> Path:
    """A command beside this interpreter, where `ple run` looks for the commands of its stages."""
    return Path(sys.executable).parent / name


def train_again(world: World) -> dict[str, Any]:
    """`ple-train` in float32, killed, run again."""
    output = world.folder / "killed"
    _, *options = training(world)
    command = [program("ple-train"), *options, "--output", output, "--checkpoint-every", "1"]
    step = kill_at_checkpoint(command, output, world.folder / "killed.log")
    run(command, world.folder / "killed.log")
    return {"killed_after_step": step}


def same_as_unkilled(world: World) -> dict[str, Any]:
    """The killed training beside the one that nobody killed. Raises AssertionError."""
    found = trained(world.folder / "killed", world.folder / "gpu" / "train")
    assert max(found["losses"], found["weights"]) <= TOLERANCE, found
    return found


def run_again(world: World) -> dict[str, Any]:
    """A recipe of two rounds with SFT, `ple run` killed in its first training, run again."""
    recipe, run_dir = world.folder / "recipe.yaml", world.folder / "run"
    half = world.queries // 2
    epochs = -(-2 * world.steps // half)
    values = {
        "model": world.model, "queries": world.file("queries"), "principles": "hh", "reward_model": world.reward,
        "run_dir": str(run_dir), "rounds": 2, "queries_per_round": half,
        "sft": {"data": world.file("sft"), "batch_size": 8},
        "gen": {"engine": "hf", "max_new_tokens": world.new_tokens},
        "train": {"batch_size": 2, "epochs": epochs, "checkpoint_every": 1, "normalize_wsft": True},
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    command = [program("ple"), "run", recipe]
    log = world.folder / "run.log"
    step = kill_at_checkpoint(command, run_dir / "policy", log)
    run(command, log)
    stages = json.loads((run_dir / "stages.json").read_text())["stages"]
    run([program("ple"), "verify", run_dir / "data"], log)
    return {"killed_after_step": step, "stages": len(stages), "pairs": pairs(run_dir / "data", 2 * half)}


def pairs(data: Path, expected: int) -> int:
    """Raises AssertionError where a row is lost or doubled."""
    import polars as pl

    rows = pl.scan_parquet(str(data / "pairs/**/*.parquet"), hive_partitioning=False).collect()
    keys = rows.select("round", "query_id", "sample").unique()
    assert len(rows) == len(keys) == expected, (len(rows), len(keys), expected)
    return len(rows)


def kill_at_checkpoint(command: list[Any], folder: Path, log: Path) -> int:
    """Start it, kill it once a checkpoint lies below the folder → that checkpoint's step."""
    with log.open("ab") as file:
        process = subprocess.Popen([str(word) for word in command], stdout=file, stderr=file)
    deadline = time.monotonic() + PATIENCE
    while not (found := newest_checkpoint(folder)):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"no checkpoint to kill it at (exit {process.wait()}):\n{end_of(log)}")
        time.sleep(0.005)
    alive = process.poll() is None
    os.kill(process.pid, signal.SIGKILL) if alive else None
    process.wait()
    assert alive, "it had ended before it was killed: it needs more steps"
    return found


def newest_checkpoint(folder: Path) -> int:
    """Its step; 0 where there is none."""
    found = [path.name.removeprefix("checkpoint-") for path in folder.rglob("checkpoint-*")]
    return max((int(step) for step in found if step.isdigit()), default=0)


def run(command: list[Any], log: Path) -> None:
    """To its end. Raises RuntimeError with the end of its log."""
    with log.open("ab") as file:
        code = subprocess.run([str(word) for word in command], stdout=file, stderr=file).returncode
    if code:
        raise RuntimeError(f"{command[0]} ended with {code}:\n{end_of(log)}")


def end_of(log: Path, characters: int = 3000) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-characters:]
