"""The data directory: the only writer of responses and pairs, and the one place that says which shards count.

    DATA/pairs/round=000/part-<unit>.parquet          the table (likewise under responses/)
    DATA/.ple/commits/pairs/round=000/<unit>.json     its commit record; without one the shard does not exist
    DATA/.ple/locks, DATA/.ple/tmp, DATA/.ple/rounds  who works on what, unfinished files, settings of rounds

A unit of work is claimed (an flock, dropped by the kernel when its holder dies), written to a temporary file, linked to
its final name and then recorded. After a kill between any two of these steps, the next claim finds out how far it got.
Nothing here is ever overwritten, and nothing is unpickled.
"""

import fcntl
import hashlib
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ple_data.storage.parquet import parquet_bytes
from schemas import files, tables
from schemas.errors import DamagedError, NewerError, PleError
from schemas.records import Commit, RoundManifest, read_record

if TYPE_CHECKING:
    import polars as pl

ROW_GROUP = 1024
POLL_SECONDS = 0.5
"""How often a unit that another process holds is looked at again."""
_CLAIM_ATTEMPTS = 3  # `holder` takes the lock for an instant; a claim must not mistake that for a holder
_CLAIM_PAUSE = 0.01  # seconds


@dataclass(frozen=True)
class Shard:
    """One committed Parquet file. `bytes` and `sha256` are those of the whole file."""

    kind: str
    round: int
    unit: str
    path: Path
    rows: int
    bytes: int
    sha256: str


class Store:
    """A data directory. Creating one touches nothing; the first claim or commit makes the directories."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._state = self.root / ".ple"
        self._tmp = self._state / "tmp"
        self._prepared = False

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    # Work on a unit

    @contextmanager
    def claim(self, kind: str, round: int, unit: str) -> Iterator[bool]:
        """Holds the unit for the time of the `with` block, without waiting.

        Yields True when the unit is ours and still to do; False when another process (or another claim of this one)
        holds it, see `holder`, or when it is committed, see `is_committed`. The kernel drops the lock when the process
        dies. A finished file that a killed process left without its record is recorded now.
        """
        self._prepare()
        path = self._lock_path(kind, round, unit)
        with files.explained(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not _lock(fd):
                yield False
                return
            try:
                with files.explained(path):
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
                yield not self.is_committed(kind, round, unit) and not self._adopt(kind, round, unit)
            finally:
                os.ftruncate(fd, 0)
                fcntl.flock(fd, fcntl.LOCK_UN)  # closing would leave it with children that inherited it
        finally:
            os.close(fd)

    def holder(self, kind: str, round: int, unit: str) -> str | None:
        """Who has claimed the unit, as 'pid 12 on host'; None when nobody (alive) has."""
        try:
            fd = os.open(self._lock_path(kind, round, unit), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            return os.pread(fd, 300, 0).decode(errors="replace") or "a process that has just started or ended"
        finally:
            os.close(fd)

    def is_committed(self, kind: str, round: int, unit: str) -> bool:
        """Whether the unit has a commit record. Raises DamagedError where it has one and its file is gone or cut."""
        record = self.record_path(kind, round, unit)
        if not record.exists():
            return False
        path = self.path(kind, round, unit)
        if not path.exists():
            raise DamagedError(f"{path}: committed, but the file is missing: restore it, or remove {record} to redo it")
        _check_size(self.read_record(record))
        return True

    def commit(self, kind: str, round: int, unit: str, table: pa.Table, provenance: Mapping[str, Any]) -> Shard:
        """Puts the unit's rows on disk, whole or not at all, and records them; call it under `claim`.

        `table` has the columns of `schemas.tables` for `kind`; `provenance` (JSON values) goes into the file's
        metadata. When the unit has been committed meanwhile, what was first stays and is returned. Raises PleError:
        rows of another round, doubled or not in the schema, or a disk that cannot be written.
        """
        self._prepare()
        final = self.path(kind, round, unit)
        data = _encode(kind, round, unit, table, provenance, final)
        if not self.is_committed(kind, round, unit) and not self._adopt(kind, round, unit):
            if not files.write_new(final, data, self._tmp):
                raise PleError(f"{final}: two processes write this unit at once: each must claim it first")
            self._record(kind, round, unit, table.num_rows, len(data), hashlib.sha256(data).hexdigest())
        return self.read_record(self.record_path(kind, round, unit))

    def _adopt(self, kind: str, round: int, unit: str) -> bool:
        """Records a finished file that lacks its record; removes one that is not what its name says.

        Raises NewerError, and touches nothing, where a newer program wrote the file.
        """
        final = self.path(kind, round, unit)
        if not final.exists():
            return False
        try:
            found = tables.read_metadata(final, kind)
            if (found.get("round"), found.get("unit")) != (round, unit):
                raise DamagedError(f"{final}: holds unit {found.get('unit')} of round {found.get('round')}")
            rows = tables.read_table(final, kind).num_rows
        except NewerError:
            raise
        except DamagedError:
            with files.explained(final):
                final.unlink()
            return False
        self._record(kind, round, unit, rows, final.stat().st_size, files.sha256_file(final))
        return True

    def _record(self, kind: str, round: int, unit: str, rows: int, size: int, sha256: str) -> None:
        file = self.path(kind, round, unit).relative_to(self.root).as_posix()
        values: dict[str, Any] = {"kind": kind, "round": round, "unit": unit, "bytes": size, "sha256": sha256}
        record = Commit(file=file, rows=rows, **values)
        files.write_new(self.record_path(kind, round, unit), record.to_json(), self._tmp)

    def _prepare(self) -> None:
        """Makes the directories, removes what dead writers left, and tries out what the disk must be able to do."""
        if self._prepared:
            return
        with files.explained(self.root):
            for directory in (self._tmp, self._state / "locks"):
                files.make_dirs(directory)
            files.remove_stale(self._tmp)
            files.probe_links(self._tmp)
        self._prepared = True

    # What is there

    def shards(self, kind: str, max_round: int | None = None, round: int | None = None) -> list[Shard]:
        """The committed shards by (round, file name), of one round or of all up to `max_round`.

        From the commit records alone; the files are not opened. Raises DamagedError on an unreadable record.
        """
        committed = map(self.read_record, self.record_paths(kind))
        wanted = (s for s in committed if round in (None, s.round) and (max_round is None or s.round <= max_round))
        return sorted(wanted, key=lambda shard: (shard.round, shard.path.name))

    def read_record(self, path: Path) -> Shard:
        """The shard that the commit record at `path` describes. Raises DamagedError."""
        commit = read_record(Commit, path)
        return Shard(path=self.root / commit.file, **commit.model_dump(exclude={"version", "file"}))

    def read(self, shard: Shard, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of a shard in the current version's columns, or those named; page checksums are verified.

        Raises DamagedError: the file is missing, cut short, altered or of a newer version.
        """
        _check_size(shard)
        table = tables.read_table(shard.path, shard.kind, columns)
        if table.num_rows != shard.rows:
            what = f"{table.num_rows} rows instead of {shard.rows}"
            raise DamagedError(f"{shard.path}: {what}: {tables.RESTORE}")
        return table

    def provenance(self, shard: Shard) -> dict[str, Any]:
        """The `ple` metadata of a shard: kind, version, round, unit, and what its writer gave. Reads the footer."""
        return tables.read_metadata(shard.path, shard.kind)

    def scan(self, kind: str, max_round: int | None = None, round: int | None = None) -> "pl.LazyFrame":
        """The committed rows as a lazy frame in the current version's columns; it may be empty.

        Sizes and footers of the files are checked at once, rows when they are collected. Raises DamagedError.
        """
        return scan_shards(kind, self.shards(kind, max_round, round))

    def save_manifest(self, manifest: RoundManifest) -> RoundManifest:
        """Freezes the settings of a round. Returns what stands: the first one saved, ours or another process's."""
        self._prepare()
        files.write_new(self.manifest_path(manifest.round), manifest.to_json(), self._tmp)
        return self.load_manifest(manifest.round) or manifest

    def load_manifest(self, round: int) -> RoundManifest | None:
        """The frozen settings of a round, None before its first start. Raises DamagedError."""
        path = self.manifest_path(round)
        return read_record(RoundManifest, path) if path.exists() else None

    def unfinished(self, shards: Iterable[Shard]) -> list[tuple[int, int, int]]:
        """(round, rows, rows asked for) of the rounds of which `shards` hold fewer rows than were asked for."""
        held: Counter[int] = Counter()
        for shard in shards:
            held[shard.round] += shard.rows
        asked = {round: manifest.rows for round in held if (manifest := self.load_manifest(round))}
        return [(t, held[t], rows) for t, rows in sorted(asked.items()) if rows and held[t] < rows]

    # Paths

    def path(self, kind: str, round: int, unit: str) -> Path:
        """Where the table of a unit stands."""
        return self.root / kind / f"round={round:03d}" / f"part-{unit}.parquet"

    def record_paths(self, kind: str) -> list[Path]:
        """The commit records of a kind, readable or not."""
        return sorted((self._state / "commits" / kind).glob("round=*/*.json"))

    def manifest_paths(self) -> list[Path]:
        """The settings of all rounds, readable or not."""
        return sorted((self._state / "rounds").glob("round=*.json"))

    def manifest_path(self, round: int) -> Path:
        """Where the settings of a round stand."""
        return self._state / "rounds" / f"round={round:03d}.json"

    def record_path(self, kind: str, round: int, unit: str) -> Path:
        """Where the commit record of a unit stands."""
        return self._state / "commits" / kind / f"round={round:03d}" / f"{unit}.json"

    def _lock_path(self, kind: str, round: int, unit: str) -> Path:
        return self._state / "locks" / f"{kind}-round={round:03d}-{unit}.lock"


def scan_shards(kind: str, shards: Sequence[Shard]) -> "pl.LazyFrame":
    """As `Store.scan`, for shards that were chosen before."""
    import polars as pl

    schema = pl.Schema(tables.SCHEMAS[kind])
    for shard in shards:
        _check_size(shard)
        tables.read_metadata(shard.path, kind)
    if not shards:
        return pl.LazyFrame(schema=schema)
    paths = [shard.path for shard in shards]
    return pl.scan_parquet(paths, schema=schema, missing_columns="insert", hive_partitioning=False)


class Waits:
    """For units that other processes hold: each of those is named once."""

    def __init__(self, store: Store, kind: str, say: Callable[[str], None]) -> None:
        self._store, self._kind, self._say = store, kind, say
        self._named: set[str] = set()

    def a_moment(self, units: Iterable[tuple[int, str]]) -> None:
        """Name the holders of these units (round, unit) that were not named before, and sleep."""
        for round, unit in units:
            holder = self._store.holder(self._kind, round, unit)
            if holder and holder not in self._named:
                self._named.add(holder)
                self._say(f"unit {unit} of round {round} is locked by {holder}: waiting for it")
        time.sleep(POLL_SECONDS)


def collect(rows: "pl.LazyFrame") -> "pl.DataFrame":
    """The rows of a lazy frame over shards, streamed. Raises DamagedError when a file cannot be decoded."""
    from polars.exceptions import ComputeError

    try:
        return rows.collect(engine="streaming")
    except (ComputeError, OSError) as error:
        first_line = str(error).splitlines()[0]
        raise DamagedError(f"a shard cannot be read ({first_line}): run `ple verify` on its directory") from error


def _lock(fd: int) -> bool:
    for attempt in range(_CLAIM_ATTEMPTS):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(_CLAIM_PAUSE * attempt)
    return False


def _check_size(shard: Shard) -> None:
    try:
        size = shard.path.stat().st_size
    except FileNotFoundError as error:
        raise DamagedError(f"{shard.path}: the file is missing: {tables.RESTORE}") from error
    if size != shard.bytes:
        raise DamagedError(f"{shard.path}: {size} bytes instead of {shard.bytes}: {tables.RESTORE}")


def _encode(kind: str, round: int, unit: str, table: pa.Table, provenance: Mapping[str, Any], path: Path) -> bytes:
    """The Parquet file of a unit."""
    try:
        table = tables.conform(table, tables.SCHEMAS[kind])
    except (pa.ArrowException, ValueError) as error:
        raise PleError(f"{path}: the rows do not fit the {kind} table: {error}") from error
    if faults := tables.row_faults(kind, table, round):
        raise PleError(f"{path}: refused rows: " + "; ".join(faults))
    return parquet_bytes(kind, table, {**provenance, "round": round, "unit": unit}, ROW_GROUP)
