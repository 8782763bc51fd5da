"""One fault and what comes of it: the rule that every stage is held to, and a tally."""

import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.disk import ERRORS, KINDS, Disk, Ended, Fault
from tests.faults.stages import Stage, World, differences, left_over, reads

LONGEST_LINE = 2000
KILLED = -9
SORTS = (
    *("lost", "doubled", "different", "stuck", "silent", "traceback", "unexpected", "hangs", "long line"),
    *("called damage or a lock", "left over"),
)
"""What may go wrong. The first three: rows or files that the stage did not leave, left twice, or left otherwise."""


@dataclass(frozen=True)
class Baseline:
    """In how many file operations a stage leaves what it does."""

    stage: Stage
    operations: int


def uninterrupted(world: World, disk: Disk) -> list[Baseline]:
    """Every stage once, in order, in the places where the later ones find what it left."""
    found = []
    for stage in world.stages():
        place = world.left / stage.name
        world.prepare(stage, place)
        ended = disk.run(stage.argv(place), place / stage.watched, world.base / f"{stage.name}.log")
        assert ended.code == 0, f"{stage.name}: {ended.said}"
        found.append(Baseline(stage, ended.operations))
    return found


def all_faults(baseline: Baseline) -> Iterator[Fault]:
    """Every operation with every kind of fault; the errors take turns."""
    for n in range(1, baseline.operations + 1):
        for at, kind in enumerate(KINDS):
            yield Fault(n, kind, ERRORS[(n + at) % len(ERRORS)])


def drawn(faults: Sequence[Fault], most: int, seed: int) -> list[Fault]:
    return list(faults) if len(faults) <= most else random.Random(seed).sample(faults, most)


@dataclass(frozen=True)
class Finding:
    """What went wrong after a fault. sort: one of SORTS."""

    sort: str
    stage: str
    fault: Fault
    met: str
    text: str

    def __str__(self) -> str:
        return f"{self.stage}, {self.fault} ({self.met}): {self.sort}: {self.text[-400:]}"


def try_fault(world: World, disk: Disk, baseline: Baseline, fault: Fault, place: Path) -> list[Finding]:
    """The stage with the fault, then again without: what it leaves must be that of an uninterrupted run.

    A write that is lost cannot be told when it happens. Whoever reads the file next must tell: the second run, or in
    its place an error that names the damage (exit code 3), or the reader of a file that is no longer one of its format.
    """
    stage = baseline.stage
    world.prepare(stage, place)
    log = place.with_suffix(".log")
    argv, watched, whole = stage.argv(place), place / stage.watched, world.left / stage.name / stage.watched
    first = disk.run(argv, watched, log, fault)
    found = list(_said_well(first, fault, stage))

    def compared(before: str = "") -> Iterator[Finding]:
        for sort, name in differences(watched, whole):
            if fault.kind != "lost" or reads(watched / name):
                yield Finding(sort, stage.name, fault, first.met, f"{before}{name}")

    if first.code == 0 and fault.kind in ("fail", "short") and first.met:
        found += compared("exit 0, and ")
    second = disk.run(argv, watched, log)
    found += _said_well(second, fault, stage)
    told = second.code == 3 and fault.kind == "lost"
    if second.code != 0 and not told:
        found.append(Finding("stuck", stage.name, fault, first.met, second.said))
    elif not told:
        found += compared()
        found += [Finding("left over", stage.name, fault, first.met, name) for name in left_over(watched, whole)]
    shutil.rmtree(place, ignore_errors=True)
    log.unlink(missing_ok=True)
    return found


def _said_well(ended: Ended, fault: Fault, stage: Stage) -> Iterator[Finding]:
    def finding(sort: str) -> Finding:
        return Finding(sort, stage.name, fault, ended.met, ended.said)

    if ended.code == 124:
        yield finding("hangs")
    if "Traceback (most recent call last)" in ended.said:
        yield finding("traceback")
    if "unexpected" in ended.said:
        yield finding("unexpected")
    if ended.code > 0 and max(map(len, ended.said.splitlines()), default=0) > LONGEST_LINE:
        yield finding("long line")
    if ended.code not in (0, KILLED, 124) and "error: " not in ended.said:
        yield finding("silent")
    told_as_damage = ended.code in (3, 4) and fault.kind == "fail" and ended.met
    if told_as_damage:
        yield finding("called damage or a lock")


def tally(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.sort for finding in findings)
    return ", ".join(f"{counts[sort]} {sort}" for sort in SORTS)
