"""A file of what was paid for: one record a line, appended and flushed as it comes, so that no kill loses one.

A line that a killed process left half-written is cut off when the file is opened again. Its user holds a lock: one
process at a time.
"""

import os
import stat
import threading
import time
import uuid
from pathlib import Path
from typing import Self, TypeVar

from pydantic import ValidationError

from schemas.errors import DamagedError
from schemas.files import explained, fsync_dir, make_dirs, read_file, unfollowed
from schemas.judging import Paid

Kept = TypeVar("Kept", bound=Paid)


class Records(dict[str, Kept]):
    """Records by the digest of their request; `add` keeps more, from any thread. These are in memory alone."""

    def add(self, *records: Kept) -> None:
        self.update({record.request: record for record in records})


class Journal(Records[Kept]):
    """The records in a file. A context manager.

    Raises DamagedError where a line is no such record.
    """

    def __init__(self, path: Path, record: type[Kept]) -> None:
        super().__init__()
        self._path, self._record = path, record
        self._lock = threading.Lock()
        with explained(path):
            make_dirs(path.parent)
            self._fd = unfollowed(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise DamagedError(f"{path}: no file, but a pipe or a device: move it away")
            self._load()
            fsync_dir(path.parent)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def add(self, *records: Kept) -> None:
        """Keep records: on disk when this returns. Raises PleError on a disk that cannot be written."""
        line = "".join(record.model_dump_json() + "\n" for record in records).encode()
        with self._lock, explained(self._path):
            size = os.fstat(self._fd).st_size
            try:
                while line:
                    line = line[os.write(self._fd, line) :]
                os.fsync(self._fd)
            except OSError:
                os.ftruncate(self._fd, size)
                raise
            self.update({record.request: record for record in records})

    def _load(self) -> None:
        content = read_file(self._path)
        whole = content[: content.rfind(b"\n") + 1]
        rest = content[len(whole) :]
        if rest[:2] != b'{"'[: len(rest)]:
            raise DamagedError(f"{self._path}: its last line is none of ours: move it away, or give another --output")
        self.update(_records(self._path, whole, self._record))
        if rest:
            with explained(self._path):
                os.ftruncate(self._fd, len(whole))


class SharedJournal(Records[Kept]):
    """The records in a folder, in a file of its own for each process, so that several may add at once.

    `refresh` reads what others have added. Raises DamagedError where a line is no such record.
    """

    def __init__(self, folder: Path, record: type[Kept]) -> None:
        super().__init__()
        self._folder, self._record = folder, record
        self._path = folder / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.jsonl"  # the newest is read last
        self._own: Journal[Kept] | None = None
        self._seen: dict[Path, int] = {}

    def refresh(self) -> None:
        """Read the whole lines of others that are new."""
        for path in sorted(self._folder.glob("*.jsonl")):
            with explained(path):
                if path == self._path or path.stat().st_size == self._seen.get(path):
                    continue
            content = read_file(path)
            seen, end = self._seen.get(path, 0), content.rfind(b"\n") + 1
            self.update(_records(path, content[seen:end], self._record, content[:seen].count(b"\n")))
            self._seen[path] = end

    def add(self, *records: Kept) -> None:
        with _OPENING:
            if self._own is None:
                self._own = Journal(self._path, self._record)
        self._own.add(*records)
        super().add(*records)


_OPENING = threading.Lock()


def _records(path: Path, whole: bytes, kind: type[Kept], lines_before: int = 0) -> dict[str, Kept]:
    found = {}
    for number, line in enumerate(whole.splitlines(), start=lines_before + 1):
        try:
            record = kind.model_validate_json(line)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"])) or "text"
            raise DamagedError(
                f"{path} line {number}: not a readable {kind.__name__} ({where}: {fault['msg']}): "
                "remove the line, and it is asked for again"
            ) from error
        found[record.request] = record
    return found
