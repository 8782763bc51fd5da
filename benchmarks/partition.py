"""How fast is the partition with its statistics by round? polars against `datasets` map and filter on the same pairs.

All give the same table: margin and set of every pair, and by round their shares, means and quantiles, the rewards, and
how long, cut and empty the responses are.

Each contender runs in a process of its own, which says its time (imports not counted) and its peak memory. It reads
pairs from Parquet shards, with responses of one token (numbers) or of 60 and their text.

    python -m benchmarks.partition --rows 10000000
    python -m benchmarks.partition --rows 1000000 --text
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.side_by_side import made_with, peak_bytes, ratio_table, seconds_of, timed_in_turns

TAU0, ALPHA, ROUNDS, SHARD = 0.2, 0.9, 4, 250_000
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
ARMS = ("y", "y_prompt")
IDS, FINISH, EMPTY = ([f"{arm}_{what}" for arm in ARMS] for what in ("ids", "finish", "empty"))
NEEDED = ["round", "s", "s_prompt", *IDS, *FINISH, *EMPTY]
BATCH, TUNED_BATCH = 10_000, 100_000
MEANS = [
    "s",
    "s_prompt",
    "margin",
    "rank",
    *EMPTY,
    *(f"{what}_{arm}" for what in ("truncated", "mean_len") for arm in ARMS),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--text", action="store_true", help="pairs with text and token ids, about 1 KB each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        name, folder = options.only
        with tempfile.TemporaryDirectory(dir=folder) as datasets_cache:
            os.environ["HF_DATASETS_CACHE"] = datasets_cache  # of this turn alone
            importlib.import_module("ple_data.partition" if name == "ours" else "datasets")
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


def with_datasets(folder: Path, tuned: bool) -> None:
    """Map for the partition, filter for the rank set, then the statistics of each round, in numpy.

    Tuned: it reads the columns that are needed alone, in larger batches, as arrays, in two processes; else whole rows,
    as lists.
    """
    rows = open_dataset(folder, NEEDED if tuned else None).with_format("numpy" if tuned else None)

    def split(batch: dict[str, Any]) -> dict[str, np.ndarray]:
        margin = np.asarray(batch["s_prompt"], dtype=np.float64) - np.asarray(batch["s"], dtype=np.float64)
        rank = margin > TAU0 * ALPHA ** np.asarray(batch["round"])
        found = {"margin": margin, "rank": rank}
        for arm in ARMS:
            found[f"truncated_{arm}"] = np.asarray(batch[f"{arm}_finish"]) == "length"
            found[f"mean_len_{arm}"] = np.array([len(ids) for ids in batch[f"{arm}_ids"]])
        return found

    how = {"batched": True, "batch_size": TUNED_BATCH if tuned else BATCH, "num_proc": 2 if tuned else None}
    marked = rows.map(split, remove_columns=[*IDS, *FINISH] if tuned else None, **how)
    marked.filter(lambda batch: batch["rank"], **how)
    table = {name: np.asarray(marked[name][:]) for name in ("round", *MEANS)}
    for t in range(ROUNDS):
        own = table["round"] == t
        [np.mean(table[name][own]) for name in MEANS]
        np.quantile(table["margin"][own], QUANTILES)


def with_datasets_polars(folder: Path) -> None:
    """The same where polars does the arithmetic on the batches that `datasets` gives."""
    rows = open_dataset(folder, NEEDED).with_format("polars")
    margin = pl.col("s_prompt").cast(pl.Float64) - pl.col("s").cast(pl.Float64)
    columns = {"margin": margin, "rank": margin > TAU0 * ALPHA ** pl.col("round")}
    for arm in ARMS:
        columns[f"truncated_{arm}"] = pl.col(f"{arm}_finish") == "length"
        columns[f"mean_len_{arm}"] = pl.col(f"{arm}_ids").list.len()
    marked = rows.map(
        lambda batch: batch.with_columns(**columns),
        batched=True,
        batch_size=TUNED_BATCH,
        remove_columns=[*IDS, *FINISH],
    )
    marked.filter(lambda batch: batch["rank"].to_list(), batched=True, batch_size=TUNED_BATCH)
    quantiles = [pl.col("margin").quantile(q).alias(f"q{q}") for q in QUANTILES]
    marked[:].group_by("round").agg(pl.col(MEANS).mean(), *quantiles)


def open_dataset(folder: Path, columns: list[str] | None) -> Any:
    """The pairs, or some of their columns."""
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset(
        "parquet",
        data_files=str(folder / "*.parquet"),
        split="train",
        columns=columns,
    )


CONTENDERS = {
    "ours": ours,
    "datasets": partial(with_datasets, tuned=False),
    "datasets, tuned": partial(with_datasets, tuned=True),
    "datasets, polars": with_datasets_polars,
}


if __name__ == "__main__":
    main()
