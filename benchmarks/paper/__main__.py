"""The paper's tables on real data, at a size for two CPU cores: one command a task, resumable, in pieces if need be.

    python -m benchmarks.paper imdb --data imdb.parquet --output runs/paper/imdb --frontier
    python -m benchmarks.paper imdb --data imdb.parquet --output runs/paper/imdb
    python -m benchmarks.paper tldr --data tldr.parquet --preferences tldr_preferences.parquet --output runs/paper/tldr
    python -m benchmarks.paper hh   --data hh.parquet --output runs/paper/hh --seeds 0 --rates docs/results/imdb.json
    python -m benchmarks.paper imdb-smollm2 --data imdb.parquet --model M --encoder E --output runs/smollm2 --frontier

--frontier moves every method's brake and compares at equal KL; without it there is one point a method. Each step is a
`ple` command in a process of its own, and a finished one does nothing: run the same command again after any stop. The
tables and the figures go to --results (docs/results by default). The frontier keeps its points there too: with that
folder it goes on on another machine, seed by seed. One point of the frontier again, from nothing:

    python -m benchmarks.paper imdb --data imdb.parquet --output runs/point --frontier --seeds 0 \\
        --only ple-residual:1.5 --rates docs/results/imdb-frontier.json
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.paper.commands import (
    THREADS,
    evaluate,
    make_models,
    train,
    warm_commands,
    write_references,
    write_round0,
)
from benchmarks.paper.methods import LEARNING_RATES, METHODS, Run
from benchmarks.paper.sweep import is_whole, select, show_points, sweep
from benchmarks.paper.tables import write_results
from benchmarks.paper.tasks import ROOT, TASKS, Task

PREPARED = Path("prepared")
"""There once every input file is whole."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--preferences", type=Path, help="preference pairs (tldr)")
    parser.add_argument("--model", type=Path, help="a pretrained policy (imdb-smollm2, -qwen, -gemma)")
    parser.add_argument("--encoder", type=Path, help="a pretrained encoder, which becomes the reward model")
    parser.add_argument("--output", type=Path, required=True, help="everything that is trained and sampled")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", help="where the tables go")
    parser.add_argument("--seeds", default="0,1,2", help="of sampling and training; the first one tunes")
    parser.add_argument("--rates", type=Path, help="a task's JSON in --results: its learning rates, none tried here")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, each on its share of two threads")
    parser.add_argument("--precision", choices=["auto", "float32", "bf16"], default="auto", help="auto: of the device")
    parser.add_argument("--frontier", action="store_true", help="every method with several values of its brake")
    parser.add_argument(
        "--only", action="append", metavar="METHOD[:BRAKE]", help="of the frontier; may be repeated; writes no tables"
    )
    arguments = parser.parse_args()
    task, results = replace(TASKS[arguments.task], precision=arguments.precision), arguments.results.absolute()
    inputs = {name: getattr(arguments, name) for name in task.inputs}
    if missing := [f"--{name}" for name, path in inputs.items() if path is None or not path.exists()]:
        parser.error(
            f"{task.name} needs {' and '.join(missing)}: Parquet files (docs/results/README.md), or a model's folder"
        )
    inputs = {name: path.absolute() for name, path in inputs.items()}
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    select(task, arguments.only)
    if arguments.rates and not arguments.rates.exists():
        parser.error(f"--rates {arguments.rates}: there is no such file")
    rates = read_rates(arguments.rates) if arguments.rates else None
    arguments.output.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.output)  # every name below is relative, so that the whole directory may move
    os.environ |= {"IMDB_JUDGE": "judge.json", "OMP_NUM_THREADS": str(THREADS // arguments.workers or 1)}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

    if arguments.frontier and not arguments.only and is_whole(task, results, seeds):
        sweep(task, results, seeds, arguments.workers, rates)
        return
    if not PREPARED.exists():
        task.prepare(inputs, Path())
        PREPARED.touch()
    make_models(task, arguments.workers)
    write_references(task, seeds)
    with warm_commands():
        write_round0(task, seeds, arguments.workers)
        if arguments.only:
            show_points(task, results, seeds, arguments.workers, rates, arguments.only)
        elif arguments.frontier:
            sweep(task, results, seeds, arguments.workers, rates)
        else:
            one_point(task, results, seeds, arguments.workers, rates, arguments.rates)


def one_point(
    task: Task, results: Path, seeds: list[int], workers: int, rates: dict[str, float] | None, rates_of: Path | None
) -> None:
    """Every method once for each seed at its usual brake, and the tables; without `rates`, after trying them."""
    if rates is None:
        tuning = [Run(method, rate, seeds[0], method.usual) for method in METHODS for rate in LEARNING_RATES]
        rates = tuned_rates(task, train_all(task, tuning, workers))
    chosen = [Run(method, rates[method.name], seed, method.usual) for seed in seeds for method in METHODS]
    lasting = train_all(task, chosen, workers)
    if diverged := [str(run.directory) for run in chosen if run not in lasting]:
        raise SystemExit(f"diverged at the learning rate that was chosen: {', '.join(diverged)}")
    for seed in seeds:
        runs = [run for run in chosen if run.seed == seed]
        evaluate(task, runs, "unseen.parquet", Path("eval", f"seed={seed}"), seed=seed)
    write_results(task, results, chosen, rates_of)


def train_all(task: Task, runs: list[Run], workers: int) -> list[Run]:
    """Every run to its end, several at once, the longest first → those that did not diverge."""
    ordered = sorted(runs, key=lambda run: run.method.name != "ppo")
    with ThreadPoolExecutor(workers) as pool:
        ended = list(pool.map(lambda run: train(task, run), ordered))
    return [run for run, well in zip(ordered, ended, strict=True) if well]


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
    """By method, the learning rate that a file of --results chose."""
    record = json.loads(results.read_text())
    if "rates" in record:
        return dict(record["rates"])
    return {one["method"]: one["learning_rate"] for one in record["methods"] if one["learning_rate"]}


if __name__ == "__main__":
    main()
