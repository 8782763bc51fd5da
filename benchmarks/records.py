"""How long is a store of many shards listed? Every command begins with that.

One unit is committed; its file and its record, each under another name, stand for so many more.

    python -m benchmarks.records --shards 100000
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.side_by_side import made_with
from ple_data.storage.store import Store
from schemas.records import seal_of
from tests.tables import table

UNIT = "00000-0123456789ab"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), options.shards)
        seconds = sorted(listing(Path(folder), options.shards) for _ in range(options.repeats))
    print(f"{options.shards:,} shards; {made_with('polars')}")
    print(f"listed in {statistics.median(seconds):.2f} s (from {seconds[0]:.2f} to {seconds[-1]:.2f})")


def write_shards(folder: Path, count: int) -> None:
    """Raises KeyError where a record is not what it was when this was written."""
    Store(folder).commit("pairs", 0, UNIT, table("pairs", [{}]), {})
    (record,) = folder.glob(f".ple/commits/**/{UNIT}.json")
    fields = json.loads(record.read_text())
    file = folder / fields["file"]
    del fields["seal"]
    for number in range(1, count):
        unit = f"{number:05d}-0123456789ab"
        named = fields | {"unit": unit, "file": fields["file"].replace(UNIT, unit)}
        shutil.copyfile(file, folder / named["file"])
        record.with_name(f"{unit}.json").write_text(json.dumps(named | {"seal": seal_of(named)}))


def listing(folder: Path, count: int) -> float:
    began = time.perf_counter()
    found = Store(folder).shards("pairs")
    assert len(found) == count, len(found)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
