"""The paper's tables on real data, at a size for two CPU cores: one command a task, resumable, in pieces if need be.

    python -m benchmarks.paper imdb --data imdb.parquet --output runs/paper/imdb
    python -m benchmarks.paper tldr --data tldr.parquet --preferences tldr_preferences.parquet --output runs/paper/tldr
    python -m benchmarks.paper hh   --data hh.parquet --output runs/paper/hh --seeds 0

Each step is a `ple` command in a process of its own, and a finished one does nothing: run the same command again
after any stop. The tables and the figure go to --results (docs/results by default).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl

from benchmarks.paper.methods import LEARNING_RATES, METHODS, QUERIES_PER_ROUND, ROUNDS, Run
from benchmarks.paper.tables import write_results
from benchmarks.paper.tasks import ROOT, TASKS, Task

PLE = [sys.executable, "-m", "cli"]
SCRATCH = ["--warmup-steps", "50", "--schedule", "cosine", "--batch-size", "32", "--microbatch-tokens", "4096"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--preferences", type=Path, help="preference pairs (tldr)")
    parser.add_argument("--output", type=Path, required=True, help="everything that is trained and sampled")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", help="where the tables go")
    parser.add_argument("--seeds", default="0,1,2", help="of sampling and training; the first one tunes")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, each on one thread")
    arguments = parser.parse_args()
    task, output = TASKS[arguments.task], arguments.output.absolute()
    inputs = {name: getattr(arguments, name) for name in task.inputs}
    if missing := [f"--{name}" for name, path in inputs.items() if path is None or not path.is_file()]:
        parser.error(f"{task.name} needs {' and '.join(missing)}: a Parquet file (docs/results/README.md says which)")
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    os.environ |= {"IMDB_JUDGE": str(output / "judge.json"), "OMP_NUM_THREADS": str(2 // arguments.workers or 1)}

    if not (output / "init" / "config.json").exists():
        task.prepare(inputs, output)
    make_models(task, output)
    write_references(output, seeds)
    tuning = [Run(method, rate, seeds[0], output) for method in METHODS for rate in LEARNING_RATES]
    train_all(task, tuning, arguments.workers)
    rates = tuned_rates(task, tuning, output)
    chosen = [Run(method, rates[method.name], seed, output) for seed in seeds for method in METHODS]
    train_all(task, chosen, arguments.workers)
    for seed in seeds:
        evaluate(
            task,
            [run for run in chosen if run.seed == seed],
            output / "unseen.parquet",
            output / "eval" / f"seed={seed}",
        )
    write_results(task, output, arguments.results, chosen, rates)


def make_models(task: Task, output: Path) -> None:
    """Base model, start policy and reward models."""
    rate = ["--learning-rate", "3e-3"]
    ple("sft", "--full", "--model", output / "init", "--data", output / "pretrain.parquet", "--output", output / "base",
        "--max-length", 512, "--weight-decay", 0.1, *rate, *SCRATCH, log=output / "base.log")  # fmt: skip
    ple("sft", "--full", "--model", output / "base", "--data", output / "sft.parquet", "--output", output / "start",
        "--max-length", 512, "--learning-rate", "1e-3", *SCRATCH, log=output / "start.log")  # fmt: skip
    for name, seed in (("reward", 0), ("second", 1)):
        if (output / f"{name}.parquet").exists():
            ple("reward", "--model", output / "base", "--data", output / f"{name}.parquet", "--output", output / name,
                "--learning-rate", "1e-3", "--max-length", 256, "--seed", seed, *SCRATCH, log=output / f"{name}.log")  # fmt: skip


def write_references(output: Path, seeds: list[int]) -> None:
    """The (x, reference) rows of SFT: as many queries as the other methods see, drawn by the seed."""
    queries = pl.read_parquet(output / "queries.parquet")
    for seed in seeds:
        path = output / "references" / f"seed={seed}.parquet"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            rows = queries.sample(min(ROUNDS * QUERIES_PER_ROUND, queries.height), seed=seed)
            rows.select("x", pl.col("reference").alias("y")).write_parquet(path)


def train_all(task: Task, runs: list[Run], workers: int) -> None:
    """Every run to its end, several at once. A run that fails is named and ends the program."""

    def train(run: Run) -> None:
        run.directory.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        ple(*run.command(task), log=Path(f"{run.directory}.log"))
        if (seconds := time.monotonic() - began) > 20:
            print(f"{run.directory.relative_to(run.root)}: {seconds:.0f} s", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(train, runs))


def tuned_rates(task: Task, runs: list[Run], output: Path) -> dict[str, float]:
    """By method, the learning rate with the highest training reward on the validation queries."""
    report = evaluate(task, runs, output / "validation.parquet", output / "eval" / "validation", second=False)
    best: dict[str, tuple[float, float]] = {}
    for run in runs:
        found = next(p for p in report["policies"] if p["label"] == label(run))["metrics"]
        reward = next(value["mean"] for name, value in found.items() if name.startswith("reward:"))
        best[run.method.name] = max(best.get(run.method.name, (float("-inf"), 0.0)), (reward, run.learning_rate))
    return {name: rate for name, (_, rate) in best.items()}


def label(run: Run) -> str:
    return f"{run.method.name}-{run.learning_rate:g}"


def evaluate(task: Task, runs: list[Run], queries: Path, output: Path, *, second: bool = True) -> dict:
    """`ple eval` of the start policy and the runs' policies."""
    policies = [f"base={runs[0].start}", *(f"{label(run)}={run.start},{run.adapter}" for run in runs)]
    reward, judge = output_root(output) / "reward", second_judge(task, output_root(output))
    words = [word for policy in policies for word in ("--policy", policy)]
    words += ["--queries", queries, "--reward-model", reward, "--trained-with", reward]
    words += ["--reward-model", judge] if second else []
    words += [] if task.reward_index is None else ["--output-index", task.reward_index]
    words += ["--engine", "hf", "--max-new-tokens", task.max_new_tokens, "--output", output]
    ple("eval", *words, log=Path(f"{output}.log"))
    return json.loads((output / "eval.json").read_text())


def output_root(evaluation: Path) -> Path:
    return evaluation.parents[1]


def second_judge(task: Task, output: Path) -> str:
    """The judge that no training saw."""
    return str(output / "second") if task.name != "imdb" else f"{ROOT / 'recipes' / 'imdb' / 'judge.py'}:score"


def ple(*words: object, log: Path) -> None:
    """One `ple` command to its end, its messages in `log`."""
    command = [*PLE, *map(str, words)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as messages:
        messages.write(f"$ ple {' '.join(map(str, words))}\n")
        messages.flush()
        code = subprocess.run(command, stdout=messages, stderr=subprocess.STDOUT, cwd=ROOT).returncode
    if code:
        raise SystemExit(f"ple {words[0]} failed with exit code {code}; its messages are in {log}")


if __name__ == "__main__":
    main()
