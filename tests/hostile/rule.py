"""What every command promises for every input, as a check of how it ended."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.disk import Disk

LONGEST_LINE = 2000
CODES = {0, 1, 2, 3, 4}
OBEYED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""What a terminal obeys: control characters and marks of direction; tab, line feed and carriage return are ours."""
SECRET = "sk-very-secret-0123456789"


@dataclass(frozen=True)
class Input:
    """One hostile input. make: write it into an empty folder, give the command line; may_succeed: it is odd, not wrong.

    outside: what is laid beside the folder, and must be as it was afterwards.
    """

    family: str
    name: str
    make: Callable[[Path], list[str]]
    may_succeed: bool = True


@dataclass
class Verdict:
    input: Input
    code: int
    said: str
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.input.family}, {self.input.name} (exit {self.code}): {', '.join(self.faults)}: {self.said[-500:]}"
        )


def tried(disk: Disk, given: Input, place: Path) -> Verdict:
    """Run the command on the input in `place`, which is new, beside a neighbour that nobody may touch."""
    neighbour = place / "neighbour"
    inside = place / "in"
    neighbour.mkdir(parents=True)
    inside.mkdir()
    for name in ("kept.txt", "part-00000-000000000000.parquet", "ple.json", "model.safetensors"):
        (neighbour / name).write_text(name)
    argv = given.make(inside)
    before = tree(neighbour)
    ended = disk.run(argv, inside, place / "log")
    verdict = Verdict(given, ended.code, ended.said)
    lines = ended.said.splitlines()
    told = [line for line in lines if line.startswith(("error: ", "Error: ", "usage: ", "Usage: "))]
    checks = {
        "hangs": ended.code == 124,
        "killed": ended.code < 0,
        "undocumented exit code": ended.code not in CODES and ended.code != 124,
        "traceback": "Traceback (most recent call last)" in ended.said,
        "unexpected": "unexpected" in ended.said and "report it" in ended.said,
        "silent": ended.code in CODES - {0} and not told,
        "taken": ended.code == 0 and not given.may_succeed,
        "long line": max(map(len, lines), default=0) > LONGEST_LINE,
        "obeyed by a terminal": bool(OBEYED.search(ended.said)),
        "secret shown": SECRET in ended.said,
        "wrote outside": tree(neighbour) != before,
    }
    verdict.faults = [name for name, found in checks.items() if found]
    return verdict


def tree(folder: Path) -> dict[str, str]:
    """Every path under a folder, with the digest of its contents."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }
