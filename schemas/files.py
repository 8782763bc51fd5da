"""How a file gets on disk whole or not at all, and survives kill -9 and power loss. Knows nothing of its contents.

A file is written under a temporary name on the same file system, flushed and fsynced, then put in place by one system
call, and its directory is fsynced. Its temporary name says which process writes it, so a leftover of a dead writer can
be told from the work of a live one.
"""

import codecs
import errno
import fcntl
import hashlib
import os
import re
import socket
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from schemas.errors import DamagedError, LockedError, PleError, UsageError
from schemas.holders import named, this_process

TMP_SUFFIX = ".tmp"
DAY = 86400.0

_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EMLINK, errno.EXDEV}
_NEEDED = "files must be hard-linked so that no writer overwrites another's: use a local or NFS disk"
_MAKE_ROOM = "make room (disk, quota or file-size limit) and run the same command again; nothing is lost"
_NOT_YOURS = "the place is read-only or not yours: change its permissions or choose another directory"
_IN_THE_WAY = "a file stands where a directory is needed, or the other way round: move it away"
_HOLDER = re.compile(r"pid (\d{1,9}) on (.*)")
"""What a lock file says of its holder."""
_ADVICE = {
    **dict.fromkeys([errno.EMFILE, errno.ENFILE], "raise the limit of open files (ulimit -n) and run it again"),
    errno.ELOOP: "it is a link, which is never followed here: move it away",
    **dict.fromkeys([errno.ENOSPC, errno.EDQUOT, errno.EFBIG], _MAKE_ROOM),
    **dict.fromkeys([errno.EROFS, errno.EACCES, errno.EPERM], _NOT_YOURS),
    **dict.fromkeys([errno.ENOTDIR, errno.EISDIR, errno.EEXIST], _IN_THE_WAY),
    **dict.fromkeys(_UNSUPPORTED, _NEEDED),
}


@contextmanager
def explained(path: Path | str, doing: str = "write") -> Iterator[None]:
    """Turns what the system says at `path`, also by another package, into one PleError sentence that says what to do.

    doing "read": errors that are not the system's but a file's are left as they are.
    """
    try:
        yield
    except PleError:
        raise
    except Exception as error:
        said = re.search(r"\(os error (\d+)\)", str(error))  # packages written in Rust say it in their text alone
        number = int(said[1]) if said else getattr(error, "errno", None) or 0
        if not number and (doing == "read" or not isinstance(error, OSError)):
            raise
        advice = _ADVICE.get(number, "check the disk and run the same command again")
        what = os.strerror(number) if number else str(error)
        raise PleError(f"{path}: cannot {doing} ({what}): {advice}") from error


def refuse_no_file(path: Path | str, missing: str = "the file is missing: restore it from a copy") -> None:
    """Raises DamagedError for a pipe, a device (neither may ever end), a folder, or where nothing is; PleError where
    the system does not say."""
    with explained(path, "read"):
        try:
            found = os.stat(path)
        except FileNotFoundError as error:
            raise DamagedError(f"{path}: {missing}") from error
        if not stat.S_ISREG(found.st_mode):
            raise DamagedError(f"{path}: it is no file: move it away, and restore the file from a copy")


def read_file(path: Path) -> bytes:
    """The bytes of a file. Raises DamagedError where it is none or is not there, PleError where it cannot be read."""
    refuse_no_file(path)
    with explained(path, "read"):
        return path.read_bytes()


def refuse_outside(root: Path | str, path: Path | str) -> None:
    """Raises DamagedError where links lead from `path`, which is named below `root`, to somewhere else."""
    place = os.path.realpath(path)
    if os.path.commonpath([os.path.realpath(root), place]) != os.path.realpath(root):
        raise DamagedError(
            f"{path}: links lead to {place}, outside {root}, where nothing is read or written: put the file or folder "
            "itself there"
        )


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Writes a file, replacing an older one in one step: readers see the old or the new, never a part.

    Raises PleError when the disk cannot be written.
    """
    with writing_atomic(path) as file:
        _write(file, data)


@contextmanager
def writing_atomic(path: Path | str) -> Iterator[BinaryIO]:
    """A file to write in pieces, that takes its name (and the place of an older one) when the block ends well.

    When the block raises, nothing has changed. Raises PleError when the disk cannot be written.
    """
    path = Path(path)
    prefix = f".{path.name}."
    with explained(path):
        make_dirs(path.parent)
        remove_stale(path.parent, prefix)
        with _temporary(path.parent, prefix) as file:
            yield file
            _flush(file)
            os.replace(file.name, path)
        fsync_dir(path.parent)


def write_new(path: Path | str, data: bytes | str, tmp_dir: Path | str) -> bool:
    """Writes a file that must not exist yet. False, and nothing changed, when somebody was first. Raises PleError.

    `tmp_dir` must exist on the same file system.
    """
    path = Path(path)
    with explained(path):
        make_dirs(path.parent)
        with _temporary(Path(tmp_dir), f"{path.name}.") as file:
            _write(file, data)
            _flush(file)
            return link_new(file.name, path)


def _write(file: BinaryIO, data: bytes | str) -> None:
    """All of it is in the file afterwards: a disk may say so of a write that it loses."""
    given = data.encode() if isinstance(data, str) else data
    file.write(given)
    file.flush()
    if os.fstat(file.fileno()).st_size != len(given):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def link_new(tmp: Path | str, final: Path | str) -> bool:
    """Gives the finished file `tmp` the name `final` and makes that durable; False when the name is taken.

    A hard link, never a rename: of two writers one wins and the other is told. `tmp` stays; its owner removes it.
    Raises PleError on a file system without hard links.
    """
    final = Path(final)
    try:
        os.link(tmp, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED | {errno.EPERM}:
            raise
        raise PleError(f"{final}: no hard link possible ({error.strerror}): {_NEEDED}") from error
    fsync_dir(final.parent)
    return True


def probe_links(directory: Path | str) -> None:
    """Tries out, on a small file, that files in `directory` can be linked. Raises PleError or OSError."""
    with _temporary(Path(directory), "probe.") as file:
        _flush(file)
        link = Path(file.name).with_suffix(".link" + TMP_SUFFIX)
        link_new(file.name, link)
        link.unlink()


@contextmanager
def _temporary(directory: Path, prefix: str) -> Iterator[BinaryIO]:
    """A temporary file that names its writer; removed at the end if it is still there."""
    path = directory / f"{prefix}{this_process().token}-{uuid.uuid4().hex}{TMP_SUFFIX}"
    with open(path, "xb") as file:
        try:
            yield file
        finally:
            path.unlink(missing_ok=True)


def remove_stale(directory: Path | str, prefix: str = "") -> int:
    """Removes temporary files whose writer is dead, and says how many. Those of live writers stay."""
    removed = 0
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        names = [e.name for e in entries if e.name.startswith(prefix) and e.name.endswith(TMP_SUFFIX)]
        for path in (Path(directory) / name for name in names):
            with suppress(OSError):  # not ours
                if is_stale(path):
                    os.unlink(path)
                    removed += 1
    return removed


def is_stale(path: Path) -> bool:
    """Whether a temporary file was left by a writer that is dead, or that nobody here can see and that wrote nothing
    for a day."""
    writer = named(path.name)
    if writer and (lives := writer.lives()) is not None:
        return not lives
    with suppress(OSError):  # removed meanwhile
        return stat.S_ISREG(path.lstat().st_mode) and time.time() - path.lstat().st_mtime > DAY
    return False


def unfollowed(path: Path | str, flags: int) -> int:
    """Opens no link, and waits for no pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def open_lock(path: Path) -> int:
    """The descriptor of a lock file, made where there is none. Raises PleError, and changes nothing, where it cannot be
    opened, is a link, or holds what no lock of ours does.
    """
    with explained(path):
        make_dirs(path.parent)
        fd = unfollowed(path, os.O_RDWR | os.O_CREAT)
    if stat.S_ISREG(os.fstat(fd).st_mode) and _is_ours(read_holder(fd)):
        return fd
    os.close(fd)
    raise DamagedError(f"{path}: it stands where a lock file belongs and is none of ours: move it away")


def _is_ours(text: str) -> bool:
    """Whether a lock file's text is what `note_holder` writes, or as much of it as a full disk took."""
    return bool(_HOLDER.fullmatch(text)) or "pid 0 on ".startswith(re.sub("[0-9]{1,9}", "0", text, count=1))


def read_holder(fd: int) -> str:
    """Who holds a lock file, as 'pid 12 on host'; empty where nobody has said so yet."""
    return os.pread(fd, 300, 0).decode(errors="replace").strip("\0 \n")


def note_holder(fd: int, path: Path) -> None:
    """Write into a lock file that this process holds it."""
    with explained(path):
        os.ftruncate(fd, 0)
        text, written = f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0
        while written < len(text):
            written += os.pwrite(fd, text[written:], written)


@contextmanager
def locked(path: Path | str, what: str | None = None, *, patience: float = 0) -> Iterator[int]:
    """Holds the lock file `path` for the time of the `with` block; the kernel drops it when the process dies.

    Gives the file's descriptor: who inherits it holds the lock too. `what` is locked, in the words of the message (its
    folder where it is not given). patience: seconds to wait for those who inherited it of a holder that is dead. Raises
    LockedError with its holder where another process has it, PleError where it cannot be written.
    """
    path = Path(path)
    fd = open_lock(path)
    try:
        deadline = time.monotonic() + patience
        while not try_lock(fd, path):
            holder = read_holder(fd)
            if time.monotonic() >= deadline or (holder and _may_live(holder)):
                holder = holder or "a process that has just started"
                raise LockedError(
                    f"{what or path.parent} is locked by {holder}; wait for it to end, or give another folder"
                )
            time.sleep(0.2)
        note_holder(fd, path)
        yield fd
    finally:
        os.close(fd)


def try_lock(fd: int, path: Path | str, kind: int = fcntl.LOCK_EX) -> bool:
    """Takes the lock of an open file; False where another process has it. Raises PleError where none can be had."""
    with explained(path, "lock"):
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _may_live(holder: str) -> bool:
    """Whether the process of a lock's text may be alive: of another machine it is believed."""
    found = _HOLDER.fullmatch(holder)
    if found is None or found[2] != socket.gethostname():
        return True
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def make_dirs(path: Path | str) -> None:
    """Creates a directory and its parents durably. Does nothing where it exists."""
    path = Path(path)
    if not path.is_dir():
        make_dirs(path.parent)
        path.mkdir(exist_ok=True)
        fsync_dir(path.parent)


def fsync_file(path: Path | str) -> None:
    """Makes the contents of a file durable."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def fsync_dir(path: Path | str) -> None:
    """Makes the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_given(path: Path, what: str = "", *, mark: bytes = codecs.BOM_UTF8) -> bytes:
    """The bytes of a file that a user named, without the byte order mark that it may begin with. Raises UsageError, and
    never opens what may not end: a pipe, a device.
    """
    name = f"{what} {path}".strip()
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{name} is no regular file but a folder, pipe or device, that may never end; give a file")
        return path.read_bytes().removeprefix(mark)
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}") from error


def read_given_text(path: Path, what: str = "") -> str:
    """The same as text. Raises UsageError where it is not UTF-8."""
    try:
        return read_given(path, what).decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} {path} is not UTF-8 text: {error}".strip()) from error


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file, in hex; reads it in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
