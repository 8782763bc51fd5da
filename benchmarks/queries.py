"""Are a million queries cheap? Time to read them, time and memory until the first unit is handed out and after it.

Writes so many JSONL queries of 6 to 30 words, then plans a round of them as `ple-gen` does, in a process of its own. An
engine that answers at once stands for a real one: what is measured is all that comes before it.

    python -m benchmarks.queries --queries 1000000 --units 40
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import made_with, peak_bytes
from tests.tiny import tiny_policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=1_000_000)
    parser.add_argument("--units", type=int, default=40, help="units that are sampled before it is stopped")
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(planned(options.only, options.units)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_queries(Path(folder, "queries.jsonl"), options.queries)
        tiny_policy(Path(folder, "model"))
        command = [sys.executable, "-m", "benchmarks.queries", "--only", folder, "--units", str(options.units)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(f"{options.queries:,} queries; {made_with('polars', 'tokenizers', 'transformers')}")
    print(f"read in {found['read']:.1f} s")
    print(f"first unit handed out after {found['first']:.1f} s from the start of the process")
    print(f"peak {found['peak'] / 2**30:.2f} GiB then, {found['later'] / 2**30:.2f} GiB after {options.units} units")


def write_queries(path: Path, count: int) -> None:
    draw = random.Random(0)
    words = [f"w{n}" for n in range(5000)]
    with path.open("w") as file:
        for number in range(count):
            x = " ".join(draw.choices(words, k=draw.randint(6, 30)))
            file.write(json.dumps({"id": f"q{number}", "x": x}) + "\n")


class _AtOnce:
    """An engine that answers at once, and ends the work after so many units."""

    def __init__(self, units: int, found: dict[str, float], began: float) -> None:
        self._left, self._found, self._began = units, found, began

    def sample(self, units: Iterator[Sequence[Any]], sampling: Any) -> Iterator[tuple[Any, Any]]:
        from ple_data.engines import Completion

        for unit in units:
            if "first" not in self._found:
                self._found |= {"first": time.time() - self._began, "peak": peak_bytes()}
            self._left -= 1
            if not self._left:
                raise KeyboardInterrupt
            for request in unit:
                yield request, Completion([5, 1], "x", "stop", None)

    def close(self) -> None:
        """There is nothing to close."""


def planned(folder: Path, units: int) -> dict[str, float]:
    began, found = time.time(), dict[str, float]()
    from ple_data.inputs.queries import load_queries
    from ple_data.sampling import generate as stage
    from schemas.options import Gen

    read = stage.load_queries

    def timed(*given: Any, **how: Any) -> Any:
        start = time.time()
        queries = read(*given, **how)
        found["read"] = time.time() - start
        return queries

    assert read is load_queries
    stage.load_queries = timed
    stage.make_engine = lambda *_: _AtOnce(units, found, began)  # type: ignore[assignment,return-value]
    given: dict[str, Any] = {
        "model": str(folder / "model"),
        "queries": str(folder / "queries.jsonl"),
        "principles": "imdb",
    }
    try:
        stage.generate(Gen(data=folder / "data", round=0, engine="hf", shuffle=True, max_new_tokens=6, **given))
    except KeyboardInterrupt:
        found["later"] = peak_bytes()
    return found


if __name__ == "__main__":
    main()
