"""Who holds or writes something: a process, as others can tell it apart, also on other machines and after it has ended.

Linux tells whether a process of this machine lives: by its number, the time it started, and the machine's boot and
process namespace. Of another machine nothing can be told from here.
"""

import hashlib
import os
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

TOKEN = "([0-9a-f]{12})-([0-9]{1,9})-([0-9]{1,19})"
"""A process in the name of a file: machine, number, time of its start."""


@dataclass(frozen=True)
class Process:
    """machine: digest of its boot and namespace. start: in clock ticks since the boot."""

    machine: str
    pid: int
    start: int
    host: str = "another machine"

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"

    @property
    def token(self) -> str:
        """See TOKEN."""
        return f"{self.machine}-{self.pid}-{self.start}"

    def lives(self) -> bool | None:
        """Whether it does; None where that cannot be seen from here."""
        return _start(self.pid) == self.start if self.machine == _machine() else None


def named(name: str) -> Process | None:
    """The process whose token stands in a file's name."""
    found = re.search(f"(?<![0-9a-f]){TOKEN}", name)
    return Process(found[1], int(found[2]), int(found[3])) if found else None


def this_process() -> Process:
    """The process that asks."""
    return _this(os.getpid())


@lru_cache(maxsize=1)
def _this(pid: int) -> Process:
    return Process(_machine(), pid, _start(pid) or 0, socket.gethostname())


@lru_cache(maxsize=1)
def _machine() -> str:
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _start(pid: int) -> int | None:
    """When a process that lives was started; None where there is none, or what is left of one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None
    return None if fields[0] in "ZXx" else int(fields[19])
