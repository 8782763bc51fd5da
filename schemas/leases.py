"""Leases: which process works on what, on any file system that knows hard links. No lock of the kernel is needed.

A lease on NAME is a file NAME.1 that only one process can make, with its holder and a number that the holder raises
every few seconds. It is over when the file is gone, when its holder is known to be dead, or when the number has stood
still for long. Whoever takes over makes NAME.2, which again only one can; the highest number is the lease. No clocks
are compared: who waits looks at its own.
"""

import json
import os
import random
import re
import stat
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from schemas.errors import DamagedError, PleError
from schemas.files import TMP_SUFFIX, explained, unfollowed
from schemas.holders import Process, this_process

RENEW_SECONDS, EXPIRE_SECONDS = 10.0, 60.0
"""How often a lease is renewed, and after how long without that it is over."""
_LONGEST = 1000
_GENERATION = re.compile(r"(.+)\.([0-9]{1,9})")
_seen: dict[Path, tuple[bytes, float]] = {}
"""What leases of others held when they were last looked at, and since when by this process's clock."""
T = TypeVar("T")


class Lease:
    """A lease of this process."""

    def __init__(self, path: Path, own: str) -> None:
        self.path, self._own, self._beat = path, own, 0

    def is_ours(self) -> bool:
        """Whether nobody has taken over."""
        name, number = _parts(self.path)
        return _generations(self.path.parent, name)[-1:] == [number] and self.is_there()

    def is_there(self) -> bool:
        """Whether its file is the one that it made, whoever may be about to take over."""
        return self._own.encode() in _read(self.path)

    def renew(self) -> bool:
        """Say that its holder lives; False where it is no longer ours. Raises OSError, PleError."""
        if not self.is_ours():
            return False
        self._beat += 1
        fd = os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.pwrite(fd, _text(self._own, self._beat), 0)
        finally:
            os.close(fd)
        return True

    def release(self) -> None:
        """Give it up."""
        _renewals.drop(self)
        if self.is_there():
            with suppress(OSError):
                self.path.unlink()


def take(folder: Path, name: str, tmp: Path) -> Lease | None:
    """The lease on `name`, or None where it is another's, also another one of this process.

    `tmp` is on the same file system. Raises PleError where neither file nor link can be made.
    """
    there = _generations(folder, name)
    if there and not _is_over(folder / f"{name}.{there[-1]}"):
        return None
    lease = Lease(folder / f"{name}.{there[-1] + 1 if there else 1}", uuid.uuid4().hex)
    with explained(lease.path):
        if not _link(lease, tmp):
            return None
    # whoever came between our look and our link is seen now, above or below: then both may give up, and come again
    *lower, highest = [folder / f"{name}.{number}" for number in _generations(folder, name)] or [lease.path]
    if highest != lease.path or not all(map(_is_over, lower)):
        lease.release()
        return None
    for path in lower:
        path.unlink(missing_ok=True)
    _renewals.add(lease)
    return lease


def holder_of(folder: Path, name: str) -> str | None:
    """Who has the lease, as 'pid 12 on host'; None where nobody (alive) has."""
    there = _generations(folder, name)
    path = folder / f"{name}.{there[-1] if there else 1}"
    return None if not there or _is_over(path) else str(_holder(path, _read(path)) or "a process that has just ended")


def left_behind(folder: Path) -> Iterator[tuple[Path, str]]:
    """The leases whose holders are dead, or cannot be seen from here, with the holder and when it was last there."""
    for path in sorted(folder.glob("*.[0-9]*")):
        holder = _holder(path, _read(path))
        if holder and not holder.lives():
            with suppress(OSError):
                yield path, f"{holder}, {time.time() - path.stat().st_mtime:.0f} s ago"


def remove_dead(folder: Path) -> None:
    """Remove the leases whose holders are known to be dead."""
    for path in folder.glob("*.[0-9]*"):
        holder = _holder(path, text := _read(path))
        if holder and holder.lives() is False and _read(path) == text:  # else the name is another's by now
            path.unlink(missing_ok=True)


def elsewhere(rest: Sequence[T]) -> list[T]:
    """What is left to do from a place of one's own: somebody else has begun at this one."""
    at = random.SystemRandom().randrange(max(1, len(rest)))
    return [*rest[at:], *rest[:at]]


def _link(lease: Lease, tmp: Path) -> bool:
    made = tmp / f"{lease.path.name}.{this_process().token}-{uuid.uuid4().hex}{TMP_SUFFIX}"
    try:
        made.write_bytes(_text(lease._own, 0))
        os.link(made, lease.path)
    except FileExistsError:
        return False
    finally:
        made.unlink(missing_ok=True)
    return True


def _text(own: str, beat: int) -> bytes:
    holder = this_process()
    return json.dumps(vars(holder) | {"own": own, "beat": f"{beat:012d}"}).encode()


def _read(path: Path) -> bytes:
    """What a lease holds; nothing where it is gone. Raises PleError for what is no file, or cannot be read."""
    with explained(path, "read"):
        try:
            fd = unfollowed(path, os.O_RDONLY)
        except FileNotFoundError:
            return b""
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise _none_of_ours(path)
            return os.pread(fd, _LONGEST, 0)
        finally:
            os.close(fd)


def _holder(path: Path, text: bytes) -> Process | None:
    """Who has a lease that holds this text; None where it is gone, or was lost with the power. Raises DamagedError."""
    if not text.strip(b"\0"):
        return None
    try:
        told = json.loads(text)
        return Process(str(told["machine"]), int(told["pid"]), int(told["start"]), str(told["host"]))
    except (ValueError, KeyError, TypeError) as error:
        raise _none_of_ours(path) from error


def _none_of_ours(path: Path) -> DamagedError:
    return DamagedError(f"{path}: it stands where a lease belongs and is none of ours: move it away")


def _is_over(path: Path) -> bool:
    text = _read(path)
    holder = _holder(path, text)
    if holder is None or holder.lives() is False:
        return True
    before, since = _seen.get(path, (b"", 0.0))
    if before != text:
        since = time.monotonic()
        _seen[path] = (text, since)
    return time.monotonic() - since > EXPIRE_SECONDS


def _generations(folder: Path, name: str) -> list[int]:
    found = (_GENERATION.fullmatch(entry) for entry in os.listdir(folder)) if folder.is_dir() else ()
    return sorted(int(part[2]) for part in found if part and part[1] == name)


def _parts(path: Path) -> tuple[str, int]:
    name, _, number = path.name.rpartition(".")
    return name, int(number)


class _Renewals:
    """Renews the leases of this process in a thread of its own."""

    def __init__(self) -> None:
        self._leases: set[Lease] = set()
        self._lock = threading.Lock()
        self._pid = 0

    def add(self, lease: Lease) -> None:
        with self._lock:
            if self._pid != os.getpid():  # a child has no threads of its parent, and none of its leases
                self._pid, self._leases = os.getpid(), set()
                threading.Thread(target=self._go_on, name="leases", daemon=True).start()
            self._leases.add(lease)

    def drop(self, lease: Lease) -> None:
        with self._lock:
            self._leases.discard(lease)

    def _go_on(self) -> None:
        while True:
            time.sleep(RENEW_SECONDS)
            with self._lock:
                leases = list(self._leases)
            for lease in leases:
                with suppress(OSError, PleError):  # a disk that is full or away: others wait for a while
                    if not lease.renew() and not lease.is_there():  # else somebody came between, and may withdraw
                        self.drop(lease)


_renewals = _Renewals()
