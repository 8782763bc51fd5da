"""`ple` commands of the benchmark: the models that every run starts from, one training, one evaluation.

Each runs to its end with its messages in a log, and does nothing where it is done. Compares nothing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.paper.methods import START, WARM, Run, frontier
from benchmarks.paper.tasks import Task, start_rows
from benchmarks.paper.warm import SOCKET
from ple_data.rewards import load_reward_model
from schemas.files import write_atomic

SCRATCH = ["--warmup-steps", 50, "--schedule", "cosine", "--batch-size", 32, "--microbatch-tokens", 4096]
THREADS = 2
DIVERGED = re.compile(r"the loss is -?(nan|inf)\b|gradient's norm (nan|inf)\b|probability tensor contains")
"""In the messages of a run whose loss or gradient left the numbers."""


def make_models(task: Task, workers: int) -> None:
    """Base model, reward models, start policy; each finished one is left alone. A pretrained policy is there."""
    if task.is_pretrained:
        words = ["--model", "encoder", "--data", "reward.parquet", "--output", "reward", "--max-length", 128]
        words += ["--epochs", task.reward_epochs, "--schedule", "cosine", "--warmup-steps", 50]
        words += ["--precision", task.precision]
        ple("reward", *words, log=Path("reward.log"), threads=THREADS)
        return
    full = ["sft", "--full", "--max-length", 512, *SCRATCH]
    base = ["--model", "init", "--data", "pretrain.parquet", "--output", "base"]
    ple(*full, *base, "--weight-decay", 0.1, "--learning-rate", 3e-3, log=Path("base.log"), threads=THREADS)
    rewards = {}
    for name, seed in (("reward", 0), ("second", 1)):
        if Path(f"{name}.parquet").exists():
            words = ["--model", "base", "--data", f"{name}.parquet", "--output", name, "--seed", seed]
            words += ["--learning-rate", 1e-3, "--max-length", 256, "--epochs", task.reward_epochs]
            rewards[name] = ["reward", *words, *SCRATCH]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda name: ple(*rewards[name], log=Path(f"{name}.log")), rewards))
    if not Path("sft.jsonl").exists():
        candidates = pl.read_parquet("candidates.parquet")
        found = load_reward_model(task.reward).score(candidates.select("x", "y").rows())
        write_atomic(Path("sft.jsonl"), start_rows(candidates, found, task).write_ndjson())
    start = ["--model", "base", "--data", "sft.jsonl", "--output", START, "--epochs", 2]
    ple(*full, *start, "--learning-rate", 1e-3, log=Path("start.log"), threads=THREADS)


def write_references(task: Task, seeds: list[int]) -> None:
    """The (x, reference) rows of SFT: as many queries as the other methods see, drawn by the seed."""
    references = pl.read_parquet("references.parquet")
    for seed in seeds:
        path = Path("references", f"seed={seed}.jsonl")
        if not path.exists():
            rows = references.sample(min(task.rounds * task.queries_per_round, references.height), seed=seed)
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, rows.select("x", pl.col("reference").alias("y")).write_ndjson())


def write_round0(task: Task, seeds: list[int], workers: int) -> None:
    """What the start policy samples in round 0, by seed, under the principle and without it: once for all methods."""
    queries = 2 * task.queries_per_round
    words = ["--model", START, "--queries", "queries.parquet", "--round", 0, "--shuffle", "--limit", queries]
    words += ["--engine", "hf", "--engine-arg", f"batch_size={task.queries_per_round}", "--unit-size", queries]
    words += ["--max-new-tokens", task.max_new_tokens, "--dtype", task.dtype, *task.asked_words()]
    wanted = {Run(m, 0, seed).common: (seed, m.guided) for seed in seeds for m in frontier(task)}

    def write(data: Path) -> None:
        seed, guided = wanted[data]
        told = ["--principles", task.principle if guided else "none", "--data", data, "--seed", seed]
        ple("gen", *words, *told, log=Path(f"{data}.log"))

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(write, wanted))


def train(task: Task, run: Run) -> bool:
    """A run to its end → whether its numbers stayed numbers. Any other failure ends the program."""
    log, diverged = Path(f"{run.directory}.log"), Path(f"{run.directory}.diverged")
    if diverged.exists():
        return False
    try:
        for words in run.commands(task):
            ple(*words, log=log)
    except SystemExit:
        if not DIVERGED.search(log.read_text().rpartition("\n$ ple ")[2]):  # of this attempt
            raise
        diverged.touch()
        print(f"{run.directory}: diverged", file=sys.stderr, flush=True)
        return False
    return True


def evaluate(
    task: Task,
    runs: list[Run],
    queries: str,
    output: Path,
    *,
    second: bool = True,
    seed: int = 0,
    threads: int | None = THREADS,
) -> dict[str, Any]:
    """`ple eval` of the start policy and the runs' policies; `threads`: None for the fewest."""
    policies = [f"base={START}", *(f"{run.label}={START},{run.adapter(task)}" for run in runs)]
    words = [word for policy in policies for word in ("--policy", policy)]
    words += ["--queries", queries, "--reward-model", task.reward, "--trained-with", task.reward]
    words += ["--reward-model", task.second_judge] if second else []
    words += ["--engine", "hf", "--engine-arg", "batch_size=256", "--unit-size", "256"]
    words += ["--max-new-tokens", str(task.max_new_tokens), *task.asked_words(), "--output", str(output)]
    words += ["--dtype", task.dtype, "--precision", task.precision]
    ple("eval", *words, "--seed", seed, log=Path(f"{output}.log"), threads=threads)
    report: dict[str, Any] = json.loads((output / "eval.json").read_text())
    return report


def ple(*words: object, log: Path, threads: int | None = None) -> None:
    """One `ple` command to its end, its messages in `log`; with `threads` of its own, or in a fork with the fewest."""
    command = [sys.executable, *(["-m", "cli"] if threads else WARM), *map(str, words)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as messages:
        messages.write(f"$ ple {' '.join(map(str, words))}\n")
        messages.flush()
        environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        code = subprocess.run(command, stdout=messages, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        raise SystemExit(f"ple {words[0]} failed with exit code {code}; its messages are in {log.absolute()}")


@contextmanager
def warm_commands() -> Iterator[None]:
    """While this is entered, commands start as forks of a process that has imported everything."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[SOCKET] = str(Path(folder, "socket"))
        server = subprocess.Popen([sys.executable, "-c", "from benchmarks.paper.warm import serve; serve()"])
        try:
            while not Path(os.environ[SOCKET]).exists():
                if server.poll() is not None:
                    raise SystemExit("benchmarks/paper/warm.py ended at its start; its message is above")
                time.sleep(0.1)
            yield
        finally:
            server.terminate()
            server.wait()
            del os.environ[SOCKET]
