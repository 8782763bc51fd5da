"""python -m tests.hostile [--most N] [--seed S] [--jobs N] [--family NAME ...]: all hostile inputs, in figures."""

import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.disk import Disk, Disks, arguments, build
from tests.faults.faults import uninterrupted
from tests.faults.stages import World
from tests.hostile.families import all_inputs as of_files
from tests.hostile.peers import judge_peers, reward_peers
from tests.hostile.rule import Input, Verdict, tried


def main() -> None:
    given = arguments("hostile", __doc__, "family")
    with tempfile.TemporaryDirectory() as folder:
        wrong = run(Path(folder), given.most, given.seed, given.jobs, given.family)
    sys.exit(bool(wrong))


def run(base: Path, most: int, seed: int, jobs: int = 1, only: list[str] | None = None) -> list[Verdict]:
    """Try the inputs and print the figures, family by family."""
    world, disks = World(base), Disks(build(base), jobs)
    with disks.one() as disk:
        uninterrupted(world, disk)
    by_family: dict[str, list[Input]] = {}
    for given in [*of_files(world), *reward_peers(world), *judge_peers(world)]:
        by_family.setdefault(given.family, []).append(given)
    wrong: list[Verdict] = []
    tries = 0
    for family, inputs in by_family.items():
        if only and family not in only:
            continue
        drawn = inputs if len(inputs) <= most else random.Random(seed).sample(inputs, most)
        began, own = time.monotonic(), []

        def attempt(disk: Disk, at_given: tuple[int, Input], family=family) -> Verdict:
            at, given = at_given
            place = base / "tries" / f"{family}-{at}".replace(" ", "-")
            verdict = tried(disk, given, place)
            shutil.rmtree(place, ignore_errors=True)
            return verdict

        for verdict in disks.each(attempt, enumerate(drawn)):
            if verdict.faults:
                own.append(verdict)
                print(f"  {verdict}", flush=True)
        counts = Counter(fault for verdict in own for fault in verdict.faults)
        figures = ", ".join(f"{count} {fault}" for fault, count in counts.items()) or "0 wrong"
        print(
            f"{family}: {len(drawn)} of {len(inputs)} inputs: {figures} ({time.monotonic() - began:.0f} s)", flush=True
        )
        wrong += own
        tries += len(drawn)
    disks.close()
    print(f"{tries} inputs: {len(wrong)} wrong")
    return wrong


if __name__ == "__main__":
    main()
