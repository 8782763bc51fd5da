"""python -m tests.scale [--kills N] [--seed S]: machines of a Ray cluster killed while rows are sampled and scored.

Three raylets on this machine stand for three machines: a head, and two that are killed with all their workers at
random times, and replaced. Every trial samples and scores a round with `--workers 3`; its rows must be those of one
undisturbed process, each once.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import polars as pl

from ple_data.storage.store import Store
from ple_data.storage.verify import verify
from tests import tiny
from tests.conftest import ROOT

QUERIES, SAMPLES = 60, 96
WAIT = (2.0, 16.0)
"""Seconds between two kills."""


class Machines:
    """A cluster of three raylets, of which two are killed."""

    def __init__(self) -> None:
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self._nodes = [self._cluster.add_node(num_cpus=1) for _ in range(2)]
        self.address = self._cluster.address

    def kill_one(self, draw: random.Random) -> None:
        at = draw.randrange(len(self._nodes))
        self._cluster.remove_node(self._nodes[at], allow_graceful=False)
        self._nodes[at] = self._cluster.add_node(num_cpus=1)

    def close(self) -> None:
        self._cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(run(Path(folder), given.kills, given.seed))


def run(base: Path, kills: int, seed: int) -> int:
    """Trials until so many machines were killed → how many trials were wrong, printed with what was seen."""
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # log-probabilities round as the threads are
    world = World(base)
    world.make("undisturbed", [])
    expected = world.rows("undisturbed")
    machines, draw = Machines(), random.Random(seed)
    killed = trials = wrong = 0
    began = time.monotonic()
    try:
        while killed < kills:
            name = f"trial {trials}"
            now, said = world.disturbed(name, machines, draw, kills - killed)
            faults = world.faults(name, expected)
            killed, trials, wrong = killed + now, trials + 1, wrong + bool(faults)
            print(f"{name}: {now} machines killed, {said} workers replaced; {faults or 'rows exact'}", flush=True)
    finally:
        machines.close()
    took = time.monotonic() - began
    print(f"{killed} machines killed in {trials} rounds of gen and score: {wrong} wrong ({took:.0f} s)")
    return wrong


class World:
    """Models, queries and the commands."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.policy = tiny.tiny_policy(base / "policy")
        self.reward = tiny.tiny_reward(base / "reward")
        rows = [{"id": f"q{n}", "x": x} for n, x in enumerate(tiny.corpus()[:QUERIES])]
        pl.DataFrame(rows).write_ndjson(base / "q.jsonl")

    def commands(self, name: str, more: list[str]) -> list[list[str]]:
        data = str(self.base / name)
        gen = ["gen", "--model", str(self.policy), "--queries", str(self.base / "q.jsonl"), "--principles", "imdb"]
        gen += ["--data", data, "--round", "0", "--engine", "hf", "--dtype", "float32", "--unit-size", "4"]
        gen += ["--samples", str(SAMPLES), "--max-new-tokens", "24", *more]
        return [gen, ["score", "--data", data, "--reward-model", str(self.reward), *more]]

    def start(self, words: list[str]) -> subprocess.Popen:
        command = [sys.executable, "-m", "cli", *words]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    def make(self, name: str, more: list[str]) -> int:
        """Both commands, to their end → workers that were replaced."""
        replaced = 0
        for words in self.commands(name, more):
            process = self.start(words)
            _, said = process.communicate()
            if process.returncode:
                raise SystemExit(f"{' '.join(words)}: exit code {process.returncode}\n{said}")
            replaced += said.count("its work goes to others")
        return replaced

    def disturbed(self, name: str, machines: Machines, draw: random.Random, most: int) -> tuple[int, int]:
        """Both commands while machines are killed → how many were, and how many workers were replaced."""
        killed = 0
        with ThreadPoolExecutor(1) as pool:  # Ray starts nodes in the main thread alone
            work = pool.submit(self.make, name, ["--workers", "3", "--ray", machines.address])
            while killed < most and not wait([work], draw.uniform(*WAIT)).done:
                machines.kill_one(draw)
                killed += 1
            return killed, work.result()

    def rows(self, name: str) -> dict[str, pl.DataFrame]:
        store = Store(self.base / name)
        return {kind: store.scan(kind).collect().sort("query_id", "sample") for kind in ("responses", "pairs")}

    def faults(self, name: str, expected: dict[str, pl.DataFrame]) -> list[str]:
        """What is wrong with a trial's rows."""
        found = [str(problem) for problem in verify(Store(self.base / name)) if problem.severity == "error"]
        for kind, rows in self.rows(name).items():
            keys = rows.select("query_id", "sample")
            if keys.n_unique() != keys.height:
                found.append(f"{kind}: rows are doubled")
            rewards = [column for column in ("s", "s_prompt") if column in rows.columns]
            if not rows.drop(rewards).equals(expected[kind].drop(rewards)):
                found.append(f"{kind}: rows differ")
            for column in rewards:
                if rows.height != expected[kind].height or far(rows[column], expected[kind][column]):
                    found.append(f"{kind}: {column} differs")
        return found


def far(one: Any, other: Any) -> bool:
    """Whether rewards differ by more than the rounding of another batch."""
    return bool((one - other).abs().max() > 1e-4)


if __name__ == "__main__":
    main()
