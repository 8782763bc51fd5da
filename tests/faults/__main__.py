"""python -m tests.faults [--most N] [--seed S] [--jobs N] [--stage NAME ...]: all faults of every stage, in figures."""

import sys
import tempfile
import time
from pathlib import Path

from tests.faults.disk import Disk, Disks, Fault, arguments, build
from tests.faults.faults import Finding, all_faults, drawn, tally, try_fault, uninterrupted
from tests.faults.stages import World


def main() -> None:
    given = arguments("faults", __doc__, "stage")
    with tempfile.TemporaryDirectory() as folder:
        findings = run(Path(folder), given.most, given.seed, given.jobs, given.stage)
    sys.exit(bool(findings))


def run(base: Path, most: int, seed: int, jobs: int = 1, only: list[str] | None = None) -> list[Finding]:
    """Try the faults and print the figures, stage by stage."""
    world, disks = World(base), Disks(build(base), jobs)
    findings: list[Finding] = []
    tried = 0
    with disks.one() as disk:
        baselines = uninterrupted(world, disk)
    for baseline in baselines:
        name = baseline.stage.name
        if only and name not in only:
            continue
        began, own = time.monotonic(), []
        faults = drawn(list(all_faults(baseline)), most, seed)

        def attempt(disk: Disk, at_fault: tuple[int, Fault], baseline=baseline, name=name) -> list[Finding]:
            at, fault = at_fault
            return try_fault(world, disk, baseline, fault, base / "tries" / f"{name}-{at}")

        for found in disks.each(attempt, enumerate(faults)):
            own += found
            for finding in found:
                print(f"  {finding}", flush=True)
        seconds = time.monotonic() - began
        print(
            f"{name}: {baseline.operations} operations, {len(faults)} faults: {tally(own)} ({seconds:.0f} s)",
            flush=True,
        )
        findings += own
        tried += len(faults)
    disks.close()
    print(f"{tried} faults: {tally(findings)}")
    return findings


if __name__ == "__main__":
    main()
