"""Does opening the training stream stay cheap as rounds pile up? Time to the first batch and peak memory, by rows.

Writes a store of 20 rounds with text of each size, then opens it as `ple-train` of the last round does, each time in a
process of its own.

    python -m benchmarks.stream --rows 10000 1000000
    python -m benchmarks.stream --rows 10000 100000 --unit 64
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa

from benchmarks.side_by_side import made_with, peak_bytes

ROUNDS, VOCABULARY, POLICY = 20, 32_000, "m@0123456789ab"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--unit", type=int, help="most rows of a file; ple-gen's default for such rounds if not given")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(open_stream(Path(options.only))))
        return
    with tempfile.TemporaryDirectory() as folder:
        stores = {rows: Path(folder, str(rows)) for rows in options.rows}
        files = {rows: write_store(store, rows, ROUNDS, options.unit) for rows, store in stores.items()}
        found = [{rows: opened(store) for rows, store in stores.items()} for _ in range(options.repeats)]
    print(f"{ROUNDS} rounds; median [least, most] of {options.repeats}; {made_with('polars', 'pyarrow')}")
    print(f"{'rows':>10} {'files':>7} {'first batch, s':>20} {'peak MiB':>10}   time and memory to the first line's")
    for rows in options.rows:
        seconds = [turn[rows]["seconds"] for turn in found]
        ratios = [
            shown([turn[rows][what] / turn[options.rows[0]][what] for turn in found]) for what in ("seconds", "peak")
        ]
        peak = statistics.median(turn[rows]["peak"] for turn in found) / 2**20
        print(f"{rows:10,} {files[rows]:7,} {shown(seconds):>20} {peak:10.0f}   {' x, '.join(ratios)} x")


def shown(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def opened(store: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.stream", "--only", str(store)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return dict(json.loads(done.stdout))


def write_store(root: Path, rows: int, rounds: int, unit: int | None = None) -> int:
    """Pairs of about 1 KB with text, in files as ple-gen writes them, of `unit` rows or its default; how many files."""
    from ple_data.sampling.plan import default_unit_size
    from ple_data.storage.store import Store
    from schemas.records import RoundManifest
    from schemas.tables import SCHEMAS

    schema = SCHEMAS["pairs"]
    numbers = np.random.default_rng(0)
    store = Store(root)
    for t in range(rounds):
        count = rows // rounds
        settings = {"policy": POLICY, "samples": 1}
        store.save_manifest(RoundManifest(round=t, settings=settings, counts={"queries_taken": count}))
        unit = unit or default_unit_size(count)
        for start in range(0, count, unit):
            size = min(unit, count - start)
            columns = {
                "query_id": [f"q{start + n}" for n in range(size)],
                "round": [t] * size,
                "sample": [0] * size,
                "x": [f"question {start + n} " + "about the film " * 10 for n in range(size)],
                "y": [f"answer {n} " + "it was a good film " * 15 for n in range(size)],
                "y_prompt": [f"answer {n} " + "it was a great film " * 15 for n in range(size)],
                "s": numbers.normal(size=size).tolist(),
                "s_prompt": numbers.normal(size=size).tolist(),
                "principle": ["p"] * size,
                "policy": [POLICY] * size,
                "reward_model": ["r@0123456789ab"] * size,
                "seed": [0] * size,
            }
            for name, length in (("x_ids", 33), ("y_ids", 66), ("y_prompt_ids", 66)):
                columns[name] = numbers.integers(0, VOCABULARY, (size, length)).tolist()
            for arm in ("y", "y_prompt"):
                columns |= {f"{arm}_finish": ["stop"] * size, f"{arm}_empty": [False] * size}
            whole = {name: columns.get(name, [None] * size) for name in schema.names}
            store.commit("pairs", t, f"{start:05d}-{t:012x}", pa.table(whole, schema=schema), {})
    return len(store.record_paths("pairs"))


def open_stream(root: Path) -> dict[str, float]:
    """Seconds from the freezing of the snapshot to the first batch, imports done, and this process's peak memory."""
    from ple_data.storage.store import Store
    from ple_train.snapshot import freeze, record_of, warn_of_another_sampler
    from ple_train.stream import PairStream, refuse_unfit_pairs
    from ple_train.train import print_partition
    from schemas.options import Train

    last = max(shard.round for shard in Store(root).shards("pairs"))
    began = time.perf_counter()
    snapshot = freeze([root], last, None)
    record_of(snapshot, {}).to_json()
    warn_of_another_sampler(snapshot, last, POLICY)
    options = Train(model="m", data=[root], round=last, output="none")
    print_partition(snapshot, options)
    limits = SimpleNamespace(vocabulary=VOCABULARY, positions=4096)
    refuse_unfit_pairs(snapshot, limits, None, POLICY)
    stream = PairStream(snapshot, options, limits)
    next(iter(stream.batches(0, 0)))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak": peak_bytes()}


if __name__ == "__main__":
    main()
