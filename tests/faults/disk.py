"""Commands of ours on a disk that fails: children of a warm process (tests/forkserver.py), with `shim.c` preloaded."""

import argparse
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from tests.forks import ForkServer

SHIM = Path(__file__).with_name("shim.c")
KINDS = {"fail": 1, "short": 2, "lost": 3, "kill before": 4, "kill after": 5}
"""As `shim.c` numbers them."""
Item = TypeVar("Item")
Result = TypeVar("Result")
ERRORS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EMFILE, errno.ENOLCK]


@dataclass(frozen=True)
class Fault:
    """What the n-th file operation meets, from 1; error: what a failed one says."""

    n: int
    kind: str
    error: int = errno.EIO

    def __str__(self) -> str:
        said = (
            f" with {errno.errorcode[self.error]}" if self.kind != "lost" and not self.kind.startswith("kill") else ""
        )
        return f"operation {self.n}: {self.kind}{said}"


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code (-9: killed), what it printed, its file operations, the one that met the fault."""

    code: int
    said: str
    operations: int
    met: str


def arguments(module: str, about: str | None, one: str) -> argparse.Namespace:
    """What the command line of `python -m tests.MODULE` says; one: what it goes through, of which some are chosen."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.{module}", description=about)
    parser.add_argument("--most", type=int, default=10**9, help=f"of each {one}, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="tried at once; default: cores")
    parser.add_argument(f"--{one}", action="append", help="this one only; may be repeated")
    return parser.parse_args()


def compiler() -> str | None:
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def build(directory: Path) -> Path:
    """The shim as a library in `directory`."""
    library = directory / "shim.so"
    command = [compiler() or "cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(SHIM), "-ldl"]
    subprocess.run(command, check=True)
    return library


class Disk:
    """Runs commands one after another; their file operations under one directory are counted, and may fail."""

    def __init__(self, library: Path) -> None:
        self._server = ForkServer(LD_PRELOAD=str(library), MPLCONFIGDIR=str(library.parent))

    def run(self, argv: list[str], watch: Path, log: Path, fault: Fault | None = None) -> Ended:
        """One command; `watch`: the directory whose operations count."""
        log.unlink(missing_ok=True)
        meets = [fault.n, KINDS[fault.kind], fault.error] if fault else [0, 0, 0]
        code, _ = self._server.run(argv, log, watch=str(watch), limit=120, fault=meets)
        said, _, counted = log.read_text(errors="replace").partition("\noperations ")
        operations, _, met = counted.strip().partition(" ")
        return Ended(code, said, int(operations or 0), met)

    def close(self) -> None:
        self._server.close()


class Disks:
    """Several at once, each with a process of its own."""

    def __init__(self, library: Path, jobs: int) -> None:
        self._idle: SimpleQueue[Disk] = SimpleQueue()
        self._all = [Disk(library) for _ in range(jobs)]
        for disk in self._all:
            self._idle.put(disk)

    @contextmanager
    def one(self) -> Iterator[Disk]:
        """A disk that nobody else uses meanwhile."""
        disk = self._idle.get()
        try:
            yield disk
        finally:
            self._idle.put(disk)

    def each(self, work: Callable[[Disk, Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """What `work` gives for each item, in their order."""

        def with_a_disk(item: Item) -> Result:
            with self.one() as disk:
                return work(disk, item)

        with ThreadPoolExecutor(len(self._all)) as pool:
            yield from pool.map(with_a_disk, items)

    def close(self) -> None:
        for disk in self._all:
            disk.close()
