"""The paper's tables on real data, at a size for two CPU cores: one command a task, resumable, in pieces if need be.

    python -m benchmarks.paper imdb --data imdb.parquet --output runs/paper/imdb
    python -m benchmarks.paper tldr --data tldr.parquet --preferences tldr_preferences.parquet --output runs/paper/tldr
    python -m benchmarks.paper hh   --data hh.parquet --output runs/paper/hh --seeds 0 --rates docs/results/imdb.json

Each step is a `ple` command in a process of its own, and a finished one does nothing: run the same command again
after any stop. The tables and the figure go to --results (docs/results by default).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.paper.methods import LEARNING_RATES, METHODS, ROUNDS, START, Run
from benchmarks.paper.tables import write_results
from benchmarks.paper.tasks import ROOT, TASKS, Task, start_rows
from ple_data.rewards import load_reward_model
from schemas.files import write_atomic

PLE = [sys.executable, "-m", "cli"]
SCRATCH = ["--warmup-steps", 50, "--schedule", "cosine", "--batch-size", 32, "--microbatch-tokens", 4096]
THREADS = 2
PREPARED = Path("prepared")
"""There once every input file is whole."""
DIVERGED = re.compile(r"the loss is -?(nan|inf)\b|gradient's norm (nan|inf)\b")
"""In the messages of a run whose loss or gradient left the numbers."""
TOLD_SECONDS = 20
"""A run that took less was done before."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--preferences", type=Path, help="preference pairs (tldr)")
    parser.add_argument("--output", type=Path, required=True, help="everything that is trained and sampled")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", help="where the tables go")
    parser.add_argument("--seeds", default="0,1,2", help="of sampling and training; the first one tunes")
    parser.add_argument("--rates", type=Path, help="a task's JSON in --results: its learning rates, none tried here")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, each on its share of two threads")
    arguments = parser.parse_args()
    task, results = TASKS[arguments.task], arguments.results.absolute()
    inputs = {name: getattr(arguments, name) for name in task.inputs}
    if missing := [f"--{name}" for name, path in inputs.items() if path is None or not path.is_file()]:
        parser.error(f"{task.name} needs {' and '.join(missing)}: a Parquet file (docs/results/README.md says which)")
    inputs = {name: path.absolute() for name, path in inputs.items()}
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    rates = read_rates(arguments.rates) if arguments.rates else None
    arguments.output.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.output)  # every name below is relative, so that the whole directory may move
    os.environ |= {"IMDB_JUDGE": "judge.json", "OMP_NUM_THREADS": str(THREADS // arguments.workers or 1)}

    if not PREPARED.exists():
        task.prepare(inputs, Path())
        PREPARED.touch()
    make_models(task, arguments.workers)
    write_references(task, seeds)
    if rates is None:
        tuning = [Run(method, rate, seeds[0]) for method in METHODS for rate in LEARNING_RATES]
        rates = tuned_rates(task, train_all(task, tuning, arguments.workers))
    chosen = [Run(method, rates[method.name], seed) for seed in seeds for method in METHODS]
    lasting = train_all(task, chosen, arguments.workers)
    if diverged := [str(run.directory) for run in chosen if run not in lasting]:
        raise SystemExit(f"diverged at the learning rate that was chosen: {', '.join(diverged)}")
    for seed in seeds:
        runs = [run for run in chosen if run.seed == seed]
        evaluate(task, runs, "unseen.parquet", Path("eval", f"seed={seed}"), seed=seed)
    write_results(task, results, chosen, arguments.rates)


def make_models(task: Task, workers: int) -> None:
    """Base model, reward models, start policy; each finished one is left alone."""
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
        write_atomic(Path("sft.jsonl"), start_rows(candidates, found, task.principle).write_ndjson())
    start = ["--model", "base", "--data", "sft.jsonl", "--output", START, "--epochs", 2]
    ple(*full, *start, "--learning-rate", 1e-3, log=Path("start.log"), threads=THREADS)


def write_references(task: Task, seeds: list[int]) -> None:
    """The (x, reference) rows of SFT: as many queries as the other methods see, drawn by the seed."""
    references = pl.read_parquet("references.parquet")
    for seed in seeds:
        path = Path("references", f"seed={seed}.jsonl")
        if not path.exists():
            rows = references.sample(min(ROUNDS * task.queries_per_round, references.height), seed=seed)
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, rows.select("x", pl.col("reference").alias("y")).write_ndjson())


def train_all(task: Task, runs: list[Run], workers: int) -> list[Run]:
    """Every run to its end, several at once → those that did not diverge. Any other failure ends the program."""

    def train(run: Run) -> bool:
        began, log = time.monotonic(), Path(f"{run.directory}.log")
        try:
            ple(*run.command(task), log=log)
        except SystemExit:
            if not DIVERGED.search(log.read_text().rpartition("\n$ ple ")[2]):  # of this attempt
                raise
            print(f"{run.directory}: diverged", file=sys.stderr, flush=True)
            return False
        if (seconds := time.monotonic() - began) > TOLD_SECONDS:
            print(f"{run.directory}: {seconds:.0f} s", file=sys.stderr, flush=True)
        return True

    first = [run for run in runs if run.method.name == "ple"]  # PPO's budget is what these sampled
    longest = [run for run in runs if run.method.name == "ppo"]
    rest = [*longest, *(run for run in runs if run not in first + longest)]
    with ThreadPoolExecutor(workers) as pool:
        ended = [*pool.map(train, first), *pool.map(train, rest)]
    return [run for run, well in zip([*first, *rest], ended, strict=True) if well]


def tuned_rates(task: Task, runs: list[Run]) -> dict[str, float]:
    """By method, the learning rate with the highest training reward on the validation queries."""
    return best_rates(evaluate(task, runs, "validation.parquet", Path("eval", "validation"), second=False), runs)


def best_rates(report: dict[str, Any], runs: list[Run]) -> dict[str, float]:
    """By method, the learning rate of the run with the highest mean reward in `report`."""
    best: dict[str, tuple[float, float]] = {}
    for run in runs:
        found = next(p for p in report["policies"] if p["label"] == run.label)["metrics"]
        reward = next(value["mean"] for name, value in found.items() if name.startswith("reward:"))
        best[run.method.name] = max(best.get(run.method.name, (float("-inf"), 0.0)), (reward, run.learning_rate))
    if lost := {method.name for method in METHODS} - best.keys():
        raise SystemExit(f"every learning rate diverged: {', '.join(sorted(lost))}")
    return {name: rate for name, (_, rate) in best.items()}


def read_rates(results: Path) -> dict[str, float]:
    """By method, the learning rate that another task chose."""
    methods = json.loads(results.read_text())["methods"]
    return {record["method"]: record["learning_rate"] for record in methods if record["learning_rate"]}


def evaluate(
    task: Task, runs: list[Run], queries: str, output: Path, *, second: bool = True, seed: int = 0
) -> dict[str, Any]:
    """`ple eval` of the start policy and the runs' policies."""
    policies = [f"base={START}", *(f"{run.label}={START},{run.adapter}" for run in runs)]
    words = [word for policy in policies for word in ("--policy", policy)]
    words += ["--queries", queries, "--reward-model", task.reward, "--trained-with", task.reward]
    words += ["--reward-model", task.second_judge] if second else []
    words += ["--engine", "hf", "--engine-arg", "batch_size=256", "--unit-size", "256"]
    words += ["--max-new-tokens", str(task.max_new_tokens), "--output", str(output)]
    ple("eval", *words, "--seed", seed, log=Path(f"{output}.log"), threads=THREADS)
    report: dict[str, Any] = json.loads((output / "eval.json").read_text())
    return report


def ple(*words: object, log: Path, threads: int | None = None) -> None:
    """One `ple` command to its end, its messages in `log`."""
    command = [*PLE, *map(str, words)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as messages:
        messages.write(f"$ ple {' '.join(map(str, words))}\n")
        messages.flush()
        environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        code = subprocess.run(command, stdout=messages, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        raise SystemExit(f"ple {words[0]} failed with exit code {code}; its messages are in {log.absolute()}")


if __name__ == "__main__":
    main()
