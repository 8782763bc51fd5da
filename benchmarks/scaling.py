"""How do time and memory grow? One size after another in a process of its own, exponents fitted, drawn on log axes.

Each study changes one thing: rows (partition and statistics), rounds (opening the training stream over all that has
been sampled), and for training vocabulary, length of the responses, width of the model, processes. `--output` gets
scaling.json and scaling.png; a size that scaling.json already holds from this machine with these versions is not
measured again. Each size is measured `--repeats` times, and the fastest counts.

    python -m benchmarks.scaling --output docs/results
    python -m benchmarks.scaling --output docs/results --studies rows,vocabulary
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.side_by_side import made_with
from schemas.files import write_atomic

PYTHON = [sys.executable, "-m"]


@dataclass(frozen=True)
class Study:
    """Sizes, and what measures one: {seconds, peak (bytes of the whole process)}, for training {tokens} beside them."""

    title: str
    sizes: tuple[int, ...]
    measure: Callable[[int], dict[str, float]]
    per: str = ""
    """What the seconds are divided by before they are drawn: a key of the measurement."""


def training(option: str, pairs: int, *more: object) -> Callable[[int], dict[str, float]]:
    def measure(size: int) -> dict[str, float]:
        return trained(["--pairs", pairs, option, size, *more], PYTHON)

    return measure


def trained(words: list[object], launch: list[object]) -> dict[str, float]:
    from benchmarks.train import Bench, parse_options

    with tempfile.TemporaryDirectory() as folder:
        Bench(Path(folder), parse_options([str(word) for word in words]))  # writes the model there
        return answer_of([*launch, "benchmarks.train", *words, "--only", "ours", folder])


def opening(rounds: int) -> dict[str, float]:
    from benchmarks.stream import write_store

    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder), 10_000 * rounds, rounds)
        return answer_of([*PYTHON, "benchmarks.stream", "--only", folder])


def partitioning(rows: int) -> dict[str, float]:
    from benchmarks.partition import write_pairs

    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder), rows, text=False)
        return answer_of([*PYTHON, "benchmarks.partition", "--only", "ours", folder])


def distributed(processes: int) -> dict[str, float]:
    launch = [*PYTHON, "torch.distributed.run", "--nproc-per-node", processes, "--standalone", "-m"]
    # without the variable torchrun and accelerate give a process that is alone all threads
    return trained(["--pairs", 160, "--threads", 1], ["env", "OMP_NUM_THREADS=1", *launch])


STUDIES = {
    "rows": Study("pairs: partition and statistics", (10**3, 10**4, 10**5, 10**6, 10**7), partitioning),
    "rounds": Study("rounds of 10,000 pairs with text: opening the stream", (1, 2, 5, 10, 20, 50), opening),
    "vocabulary": Study(
        "vocabulary: training", (1024, 4096, 16_384, 65_536, 151_936), training("--vocabulary", 32), "tokens"
    ),
    "length": Study(
        "median response tokens: training", (16, 64, 256, 1024), training("--response", 32, "--longest", 4096), "tokens"
    ),
    "width": Study("hidden size: training", (64, 128, 256, 512, 1024), training("--hidden", 32), "tokens"),
    "processes": Study("processes of one thread: training", (1, 2), distributed, "tokens"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--studies", default=",".join(STUDIES), help=", ".join(STUDIES))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if unknown := set(options.studies.split(",")) - STUDIES.keys():
        parser.error(f"no study {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}")
    path, made = options.output / "scaling.json", made_with("torch", "transformers", "peft", "polars")
    found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    for name in options.studies.split(","):
        points = found.setdefault(name, {})
        for size in STUDIES[name].sizes:
            if points.get(str(size), {}).get("made_with") != made:
                tries = [STUDIES[name].measure(size) for _ in range(options.repeats)]
                points[str(size)] = min(tries, key=lambda one: one["seconds"]) | {"made_with": made}
                write_atomic(path, json.dumps(found, indent=1) + "\n")
                print(f"{name} {size:,}: {points[str(size)]}", file=sys.stderr, flush=True)
    found = {name: found[name] for name in STUDIES if name in found}
    draw(found, options.output / "scaling.png")
    print(f"{made}\n")
    print("| what grows | sizes | what is measured | grows as size to the power | peak MiB, first and last |")
    print("| --- | --- | --- | --- | --- |")
    for name, points in found.items():
        sizes, seconds, peaks = series(name, points)
        cells = [STUDIES[name].title, f"{sizes[0]:,} to {sizes[-1]:,}", unit(name), f"{exponent(sizes, seconds):.2f}"]
        print(f"| {' | '.join(cells)} | {peaks[0]:,.0f}, {peaks[-1]:,.0f} |")


def unit(name: str) -> str:
    """What the time of a study is in."""
    return f"seconds a {STUDIES[name].per.rstrip('s')}" if STUDIES[name].per else "seconds"


def answer_of(command: list[object]) -> dict[str, float]:
    """The lines of JSON that the command prints, one a process: the slowest's time, and memory of all together."""
    done = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True)
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    slowest: dict[str, float] = max(answers, key=lambda answer: answer["seconds"])
    return slowest | {"peak": sum(answer["peak"] for answer in answers)}


def series(name: str, points: dict[str, Any]) -> tuple[list[int], list[float], list[float]]:
    """Sizes, seconds (by what the study divides them by) and peak MiB, by rising size."""
    sizes = sorted(map(int, points))
    rows = [points[str(size)] for size in sizes]
    per = STUDIES[name].per
    return sizes, [row["seconds"] / row.get(per, 1) for row in rows], [row["peak"] / 2**20 for row in rows]


def exponent(sizes: list[int], values: list[float]) -> float:
    """Slope on log axes over the larger half of the sizes, where fixed costs no longer hide it."""
    half = len(sizes) // 2 if len(sizes) > 3 else 0
    return float(np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0])


def draw(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, len(found), figsize=(3.4 * len(found), 6), layout="constrained", squeeze=False)
    for (name, points), (upper, lower) in zip(found.items(), grid.T, strict=True):
        sizes, seconds, peaks = series(name, points)
        upper.plot(sizes, seconds, "o-")
        upper.set(title=f"{STUDIES[name].title}\nexponent {exponent(sizes, seconds):.2f}", ylabel=unit(name))
        upper.title.set_fontsize(9)
        lower.plot(sizes, peaks, "s-", color="tab:orange")
        lower.set(ylabel="peak MiB", xlabel=name)
        for axis in (upper, lower):
            axis.set(xscale="log", yscale="log")
            axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
