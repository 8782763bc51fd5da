"""kill -9 at random points of ple-gen, ple-score and ple-train: the same command, run again, loses nothing.

Every kill ends a real process, and the command is then run again, in the same place, until it is done. Most processes
are forked from one that has imported torch (tests/forkserver.py), so that a kill costs no start; some are fresh.
Half of the kills come after a random time, half just before a random change of the file system. The end must be
bit-identical to an uninterrupted run.
"""

import hashlib
import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ple_data.storage.store import Store
from ple_data.storage.verify import verify
from tests.forks import ENVIRONMENT, ROOT, ForkServer

KILLS = {"gen": 18, "score": 16, "train": 16}
"""Kills in forked processes; those of FRESH_KILLS come on top for each command."""
FRESH_KILLS = [(0.2, 3.0), (2.0, 8.0)]
"""From and to, in seconds after the start: the imports, and the work."""
MOST_KILLS_IN_A_ROW = 4
QUERIES = 150
TIMINGS = {"seconds", "tokens_per_second"}
"""Metrics that differ from run to run."""


@dataclass(frozen=True)
class Command:
    """A command line that works in a directory of its own, given by `place`, and what it leaves there."""

    argv: Callable[[Path], list[str]]
    watched: str
    """The directory that it writes, in `place`."""
    contents: Callable[[Path], dict[str, Any]]
    """What must be the same after kills as without them."""
    prepare: Callable[[Path], None]
    """Put into `place` what the command starts from."""
    expected: dict[str, Any]
    """The contents that an uninterrupted run left, in how many seconds and changes of the file system."""
    seconds: float
    changes: int


@pytest.fixture(scope="module")
def commands(
    policy: Path, reward: Path, tmp_path_factory: pytest.TempPathFactory, forks: ForkServer
) -> dict[str, Command]:
    """The three commands; each stage starts from what an uninterrupted run of the stage before left."""
    base = tmp_path_factory.mktemp("inputs")
    queries = base / "queries.jsonl"
    lines = [json.dumps({"id": f"q{n}", "x": f"The film {n} was"}) for n in range(QUERIES)]
    queries.write_text("\n".join(lines))

    def gen(place: Path) -> list[str]:
        options = {"model": policy, "queries": queries, "principles": "hh", "data": place / "data", "round": 0}
        more = {"engine": "hf", "max-new-tokens": 4, "seed": 3, "limit": QUERIES}
        return ["gen", *as_options({**options, **more})]

    def score(place: Path) -> list[str]:
        return ["score", *as_options({"data": place / "data", "reward-model": reward})]

    def train(place: Path) -> list[str]:
        options = {"model": policy, "data": base / "data", "round": 0, "output": place / "adapter", "batch-size": 16}
        more = {"checkpoint-every": 2, "precision": "float32", "learning-rate": 1e-3}
        return ["train", *as_options({**options, **more})]

    def nothing(_: Path) -> None:
        pass

    def copy_responses(place: Path) -> None:
        subprocess.run(["cp", "-r", str(base / "responses-only"), str(place / "data")], check=True)

    def responses(place: Path) -> dict[str, Any]:
        return store_contents(place, "responses")

    def pairs(place: Path) -> dict[str, Any]:
        return store_contents(place, "pairs")

    plans = {"gen": (gen, "data", responses, nothing), "score": (score, "data", pairs, copy_responses)}
    plans["train"] = (train, "adapter", adapter_contents, nothing)
    found = {}
    for name, (argv, watched, contents, prepare) in plans.items():
        seconds, changes = run_to_the_end(forks, argv(base), base, watched)
        found[name] = Command(argv, watched, contents, prepare, contents(base), seconds, changes)
        if name == "gen":
            subprocess.run(["cp", "-r", str(base / "data"), str(base / "responses-only")], check=True)
    return found


def as_options(options: dict[str, Any]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def run_to_the_end(forks: ForkServer, argv: list[str], place: Path, watched: str) -> tuple[float, int]:
    """Seconds and number of file-system changes of a run that nobody kills."""
    log = place / "log"
    code, seconds = forks.run(argv, log=log, watch=str(place / watched))
    assert code == 0, log.read_text()
    return seconds, int(log.read_text().rsplit("changes ", 1)[1])


def store_contents(place: Path, kind: str) -> dict[str, Any]:
    """Bytes of every committed file, after all checks of the store."""
    store = Store(place / "data")
    assert [problem for problem in verify(store) if problem.severity == "error"] == []
    rows = store.scan(kind).collect()
    assert rows["query_id"].n_unique() == rows.height == QUERIES
    files = {shard.path.name: shard.path.read_bytes() for shard in store.shards(kind)}
    assert {file.name for file in (store.root / kind).rglob("*.parquet")} == files.keys()
    return files


def adapter_contents(place: Path) -> dict[str, Any]:
    """Digest of every file of the adapter's directory, and record and metrics without their timings."""
    output = place / "adapter"
    files = {
        str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(output.rglob("*"))
        if file.is_file() and file.name not in ("metrics.parquet", "ple.json", "lock")
    }
    record = json.loads((output / "ple.json").read_text())
    del record["cost"]["seconds"]
    metrics = pq.read_table(output / "metrics.parquet")
    steps = metrics.select([name for name in metrics.column_names if name not in TIMINGS]).to_pylist()
    return {**files, "record": record, "metrics": steps}


def committed(place: Path) -> dict[Path, tuple[int, int]]:
    """Every committed shard, with its inode and time of writing."""
    store = Store(place / "data")
    stats = {shard.path: shard.path.stat() for kind in ("responses", "pairs") for shard in store.shards(kind)}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in stats.items()}


def sampled_units(log: Path) -> list[str]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.removeprefix("unit ") for line in lines if line.startswith("unit ")]


@pytest.mark.parametrize("name", KILLS)
def test_killed_at_random_points(name: str, commands: dict[str, Command], forks: ForkServer, tmp_path: Path) -> None:
    """Chains of one to four kills in one directory, then a run to the end, until KILLS processes have died."""
    command = commands[name]
    chance = random.Random(f"kill {name}")
    kills = chains = 0
    while kills < KILLS[name]:
        place = tmp_path / f"chain-{chains}"
        place.mkdir()
        command.prepare(place)
        chains += 1
        for link in range(chance.randint(1, MOST_KILLS_IN_A_ROW)):
            before = committed(place)
            point = random_point(chance, command)
            log = place / f"log-{link}"
            code, _ = forks.run(command.argv(place), log=log, watch=str(place / command.watched), **point)
            assert code in (0, -signal.SIGKILL), f"{point}: {log.read_text()}"
            assert before.items() <= committed(place).items(), f"{point}: a committed unit was lost or replaced"
            assert not {file_unit(path) for path in before} & set(sampled_units(log)), f"{point}: sampled again"
            if code == 0:
                break
            kills += 1
        run_to_the_end(forks, command.argv(place), place, command.watched)
        assert command.contents(place) == command.expected, f"chain {chains} differs from an uninterrupted run"


def random_point(chance: random.Random, command: Command) -> dict[str, Any]:
    """A change of the file system or a moment, anywhere in the command's work."""
    if chance.random() < 0.5:
        return {"kill_at": chance.randint(1, command.changes)}
    return {"kill_after": chance.uniform(0, command.seconds)}


def file_unit(path: Path) -> str:
    return path.stem.removeprefix("part-")


@pytest.mark.parametrize("name", KILLS)
def test_fresh_processes_killed_at_random_points(
    name: str, commands: dict[str, Command], forks: ForkServer, tmp_path: Path
) -> None:
    """The console commands themselves, imports and all, killed by their parent."""
    command = commands[name]
    chance = random.Random(f"fresh {name}")
    command.prepare(tmp_path)
    for earliest, latest in FRESH_KILLS:
        assert run_fresh(command.argv(tmp_path), kill_after=chance.uniform(earliest, latest)) in (0, -signal.SIGKILL)
    run_to_the_end(forks, command.argv(tmp_path), tmp_path, command.watched)
    assert command.contents(tmp_path) == command.expected


def run_fresh(argv: list[str], kill_after: float) -> int:
    """Exit code of a command in a new Python, -9 where it was killed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *argv], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
    return process.wait()


def test_there_are_at_least_fifty_kills() -> None:
    assert sum(KILLS.values()) >= 50
