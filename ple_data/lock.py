"""One process at a time: an flock on a file, which the kernel drops when its holder dies. Never waits."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from schemas.errors import LockedError
from schemas.files import explained, make_dirs


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock for the `with` block. Raises LockedError that names the holder."""
    with explained(path):
        make_dirs(path.parent)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 300, 0).decode(errors="replace") or "another process"
            raise LockedError(f"{path} is locked by {holder}; run the same command again when it has ended") from None
        with explained(path):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(fd)
