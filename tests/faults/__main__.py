"""python -m tests.faults [--most N] [--seed S] [--stage NAME ...]: all faults of every stage, and their figures."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.disk import Disk, build
from tests.faults.faults import Finding, all_faults, drawn, tally, try_fault, uninterrupted
from tests.faults.stages import World


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--most", type=int, default=10**9, help="faults of each stage, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", action="append", help="this one only; may be repeated")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        findings = run(Path(folder), given.most, given.seed, given.stage)
    sys.exit(bool(findings))


def run(base: Path, most: int, seed: int, only: list[str] | None = None) -> list[Finding]:
    """Try the faults and print the figures, stage by stage."""
    world, disk = World(base), Disk(build(base))
    findings: list[Finding] = []
    tried = 0
    for baseline in uninterrupted(world, disk):
        name = baseline.stage.name
        if only and name not in only:
            continue
        began, own = time.monotonic(), []
        faults = drawn(list(all_faults(baseline)), most, seed)
        for at, fault in enumerate(faults):
            own += try_fault(world, disk, baseline, fault, base / "tries" / f"{name}-{at}")
        seconds = time.monotonic() - began
        print(f"{name}: {baseline.operations} operations, {len(faults)} faults, {tally(own)} ({seconds:.0f} s)")
        for finding in own[:20]:
            print(f"  {finding}", flush=True)
        findings += own
        tried += len(faults)
    disk.close()
    print(f"{tried} faults: {tally(findings)}")
    return findings


if __name__ == "__main__":
    main()
