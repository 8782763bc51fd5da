"""How fast is the partition with its statistics by round? polars against `datasets` map and filter on the same pairs.

Each contender runs in a process of its own, which says its time and its peak memory: rewards alone (numbers), or whole
pairs with text and token ids, read from Parquet shards.

    python -m benchmarks.partition --rows 10000000
    python -m benchmarks.partition --rows 1000000 --text
"""

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.side_by_side import made_with, peak_bytes, ratio_table, seconds_of, timed_in_turns

TAU0, ALPHA, ROUNDS, SHARD = 0.2, 0.9, 4, 250_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--text", action="store_true", help="pairs with text and token ids, about 1 KB each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        name, folder = options.only
        seconds = seconds_of(partial(CONTENDERS[name], Path(folder)))
        print(json.dumps({"seconds": seconds, "peak": peak_bytes()}))
        return
    peaks: dict[str, int] = {}

    def run(name: str, folder: str) -> float:
        command = [sys.executable, "-m", "benchmarks.partition", "--only", name, folder]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        peaks[name] = max(peaks.get(name, 0), found["peak"])
        return float(found["seconds"])

    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder), options.rows, options.text)
        seconds = timed_in_turns({name: partial(run, name, folder) for name in CONTENDERS}, options.repeats)
    print(f"{options.rows:,} pairs{' with text' if options.text else ''}; {made_with('polars', 'datasets')}")
    print(ratio_table(seconds, options.rows, "pairs"))
    print("peak memory:", ", ".join(f"{name} {peak / 2**20:.0f} MiB" for name, peak in peaks.items()))


def write_pairs(folder: Path, rows: int, text: bool) -> None:
    """Shards of pairs with the columns that `round_statistics` reads."""
    numbers = np.random.default_rng(0)
    for start in range(0, rows, SHARD):
        count = min(SHARD, rows - start)
        length = 60 if text else 1
        ids = pl.Series(np.broadcast_to(numbers.integers(0, 30_000, length, dtype=np.int32), (count, length)))
        frame = pl.DataFrame(
            {
                "round": ((start + np.arange(count)) * ROUNDS // rows).astype(np.int32),
                "s": numbers.normal(size=count).astype(np.float32),
                "s_prompt": numbers.normal(0.3, size=count).astype(np.float32),
            }
        ).with_columns(
            *(pl.lit("stop").alias(f"{arm}_finish") for arm in ("y", "y_prompt")),
            *(pl.lit(False).alias(f"{arm}_empty") for arm in ("y", "y_prompt")),
            *(ids.cast(pl.List(pl.Int32)).alias(f"{arm}_ids") for arm in ("y", "y_prompt")),
        )
        if text:
            words = pl.Series(numbers.integers(0, 10**9, count)).cast(pl.String)
            frame = frame.with_columns(*((words + " the film was great" * 14).alias(c) for c in ("x", "y", "y_prompt")))
        frame.write_parquet(folder / f"part-{start:010d}.parquet")


def ours(folder: Path) -> None:
    from ple_data.partition import round_statistics

    round_statistics(pl.scan_parquet(folder / "*.parquet"), TAU0, ALPHA)


def with_datasets(folder: Path) -> None:
    """Batched map for the partition, filter for the rank set, means by round."""
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset(
        "parquet",
        data_files=str(folder / "*.parquet"),
        split="train",
        cache_dir=str(folder / f"cache-{np.random.rand()}"),
    )

    rows = rows.select_columns(["round", "s", "s_prompt"])

    def split(batch: dict[str, list[float]]) -> dict[str, list[float]]:
        margin = np.array(batch["s_prompt"], dtype=np.float64) - np.array(batch["s"], dtype=np.float64)
        tau = TAU0 * ALPHA ** np.array(batch["round"])
        w = np.tanh(-margin / 2)
        return {"margin": margin.tolist(), "rank": (margin > tau).tolist(), "w": w.tolist()}

    marked = rows.map(split, batched=True, batch_size=10_000)
    for t in range(ROUNDS):
        part = marked.filter(lambda batch, t=t: np.array(batch["round"]) == t, batched=True, batch_size=10_000)
        np.mean(part["rank"]), np.mean(part["margin"]), np.quantile(part["margin"], [0.05, 0.5, 0.95])


CONTENDERS = {"ours": ours, "datasets": with_datasets}


if __name__ == "__main__":
    main()
