"""The data directory: the only writer of responses and pairs, and the one place that says which shards count.

    DATA/pairs/round=000/part-<unit>.parquet          the table (likewise under responses/)
    DATA/.ple/commits/pairs/round=000/<unit>.json     its commit record; without one the shard does not exist
    DATA/.ple/finished/pairs-round=000                says that all of a round's units were committed
    DATA/.ple/leases, DATA/.ple/tmp, DATA/.ple/rounds  who works on what, unfinished files, settings of rounds

A unit of work is claimed (a lease that ends with its holder), written to a temporary file, linked to its final name and
then recorded. After a kill between any two of these steps, the next claim finds out how far it got.
Nothing here is ever overwritten, and nothing is unpickled. Links that lead out of DATA are never followed.
"""

import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ple_data.common.uncollected import uncollected
from ple_data.storage.listing import read_quickly, rounds_of
from ple_data.storage.parquet import parquet_bytes
from schemas import files, leases, tables
from schemas.errors import ClaimLostError, DamagedError, NewerError, PleError, UsageError, first_line
from schemas.records import Commit, Probe, R, RoundManifest, read_record

if TYPE_CHECKING:
    import polars as pl

ROW_GROUP = 1024
POLL_SECONDS = 0.5
"""How often a unit that another process holds is looked at again."""
OWNER = Path(".ple") / "reward_model"
"""Where a store holds the name of the model that its pairs are scored by."""
_SCAN = re.compile(rf"Parquet SCAN \[(.*?)/({'|'.join(tables.STORED)})/round=\d+/part-[^/]*\.parquet")


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
        if os.fsencode(self.root.absolute()).decode(errors="replace") != str(self.root.absolute()):
            raise UsageError(
                f"{str(self.root.absolute())!r}: the name is no UTF-8, which polars needs: rename the folder"
            )
        self._state = self.root / ".ple"
        self._tmp, self._leases = self._state / "tmp", self._state / "leases"
        self._held: dict[tuple[str, int, str], leases.Lease] = {}
        self._prepared = False

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    # Work on a unit

    @contextmanager
    def claim(self, kind: str, round: int, unit: str) -> Iterator[bool]:
        """Holds the unit for the time of the `with` block, without waiting (`schemas.leases`).

        Yields True when the unit is ours and still to do; False when another process (or another claim of this one)
        holds it, see `holder`, or when it is committed, see `is_committed`. A claim ends with its process. A finished
        file that a killed process left without its record is recorded now.
        """
        self._prepare()
        lease = leases.take(self._leases, _lease_name(kind, round, unit), self._tmp)
        if lease is None:
            yield False
            return
        self._held[kind, round, unit] = lease
        try:
            yield not self.is_committed(kind, round, unit) and not self._adopt(kind, round, unit)
        finally:
            del self._held[kind, round, unit]
            lease.release()

    def holder(self, kind: str, round: int, unit: str) -> str | None:
        """Who has claimed the unit, as 'pid 12 on host'; None when nobody (alive) has."""
        return leases.holder_of(self._leases, _lease_name(kind, round, unit))

    def left_behind(self) -> Iterator[tuple[Path, str]]:
        """The claims whose holders are dead, or cannot be seen from here, with who that is."""
        return leases.left_behind(self._leases)

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

    def committed(self, kind: str, round: int) -> set[str]:
        """The units of a round that have a commit record, readable or not."""
        return {path.stem for path in self.record_path(kind, round, "unit").parent.glob("*.json")}

    def commit(self, kind: str, round: int, unit: str, table: pa.Table, provenance: Mapping[str, Any]) -> Shard:
        """Puts the unit's rows on disk, whole or not at all, and records them; call it under `claim`.

        `table` has the columns of `schemas.tables` for `kind`; `provenance` (JSON values) goes into the file's
        metadata. When the unit has been committed meanwhile, what was first stays and is returned. Raises PleError:
        rows of another round, doubled or not in the schema, a claim that was lost, or a disk that cannot be written.
        """
        self._prepare()
        final = self.path(kind, round, unit)
        data = _encode(kind, round, unit, table, provenance, final)
        if not self.is_committed(kind, round, unit) and not self._adopt(kind, round, unit):
            lease = self._held.get((kind, round, unit))
            if lease and not lease.is_ours():
                raise ClaimLostError(
                    f"{final}: {self.holder(kind, round, unit) or 'another process'} took over, since this process had "
                    f"stood still for {leases.EXPIRE_SECONDS:.0f} s"
                )
            if files.write_new(final, data, self._tmp):
                self._record(kind, round, unit, table.num_rows, len(data), hashlib.sha256(data).hexdigest())
            elif lease is None or not self._adopt(kind, round, unit):
                raise PleError(f"{final}: two processes write this unit at once: each must claim it first")
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
            for directory in (self._tmp, self._leases):
                files.refuse_outside(self.root, directory)
                files.make_dirs(directory)
            files.remove_stale(self._tmp)
            leases.remove_dead(self._leases)
            files.probe_links(self._tmp)
        self._prepared = True

    # What is there

    @uncollected()
    def shards(self, kind: str, max_round: int | None = None, round: int | None = None) -> list[Shard]:
        """The committed shards by (round, file name), of one round or of all up to `max_round`.

        From the commit records alone; the files are not opened. Raises DamagedError on an unreadable record.
        """
        found = []
        for number, folder in rounds_of(self._state / "commits" / kind):
            if number is None:
                list(map(self.read_record, folder.glob("*.json")))  # says that they do not belong there
            elif round in (None, number) and (max_round is None or number <= max_round):
                data = self.root / kind / folder.name
                for path, told in read_quickly(self.root, folder, data, kind, number):
                    found.append(self.read_record(Path(path)) if told is None else Shard(kind, number, *told))
        return sorted(found, key=lambda shard: shard.round)  # those of a round come by name

    def read_record(self, path: Path) -> Shard:
        """The shard that the commit record at `path` describes. Raises DamagedError, also for another place or file
        than its writer chooses.
        """
        commit = self._placed(Commit, path, lambda found: self.record_path(found.kind, found.round, found.unit))
        shard = Shard(
            path=self.path(commit.kind, commit.round, commit.unit), **commit.model_dump(exclude={"version", "file"})
        )
        if self.root / commit.file != shard.path:
            raise DamagedError(f"{path}: it names {commit.file}, which is not its unit's file: remove it")
        return shard

    def _placed(self, model: type[R], path: Path, place: Callable[[R], Path]) -> R:
        """The record at `path`, which must be where its writer puts it."""
        record = read_record(model, path)
        if place(record) != path:
            raise DamagedError(f"{path}: this record belongs at {place(record)}: put it back there, or remove it")
        return record

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

    def save_probe(self, probe: Probe) -> Probe:
        """Keep what tells a round's policy. Returns what stands: the first one, ours or another process's."""
        self._prepare()
        path = self.probe_path(probe.round)
        files.write_new(path, probe.to_json(), self._tmp)
        return read_record(Probe, path)

    def load_manifest(self, round: int) -> RoundManifest | None:
        """The frozen settings of a round, None before its first start. Raises DamagedError."""
        path = self.manifest_path(round)
        return self.read_manifest(path) if path.exists() else None

    def read_manifest(self, path: Path) -> RoundManifest:
        """The settings in a file of `manifest_paths`. Raises DamagedError."""
        return self._placed(RoundManifest, path, lambda found: self.manifest_path(found.round))

    def finish(self, kind: str, round: int, counts: Mapping[str, int] | None = None) -> None:
        """Keep how many units of a round are committed, which are all: one that is missing later was lost.

        counts: of its queries, for the round's settings where they were not known when it began. What killed writers
        left is removed.
        """
        files.remove_stale(self._tmp)
        begun = self.load_manifest(round) if counts else None
        if begun and begun.rows is None:
            files.write_atomic(self.manifest_path(round), begun.model_copy(update={"counts": counts}).to_json())
        units = len(self.shards(kind, round=round))
        if self.finished_units(kind, round) < units:
            files.write_atomic(self._finished_path(kind, round), str(units))

    def finished_units(self, kind: str, round: int) -> int:
        """How many units a round had when it was finished; 0 where it was not, or by 0.1.0. Raises DamagedError."""
        path = self._finished_path(kind, round)
        text = files.read_file(path) if path.exists() else b"0"
        if not re.fullmatch(rb"[0-9]{1,9}", text):
            raise DamagedError(f"{path}: it holds no number of units: remove it, and run the command again")
        return int(text)

    def finished_rounds(self, kind: str) -> list[int]:
        """The rounds of which it is kept how many units they have."""
        names = (path.name.removeprefix(f"{kind}-round=") for path in (self._state / "finished").glob(f"{kind}-*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def unfinished(self, shards: Iterable[Shard]) -> list[tuple[int, int, int]]:
        """(round, rows, rows asked for) of the rounds of which `shards` hold fewer rows than were asked for."""
        held: Counter[int] = Counter()
        for shard in shards:
            held[shard.round] += shard.rows
        asked = {round: manifest.rows for round in held if (manifest := self.load_manifest(round))}
        return [(t, held[t], rows) for t, rows in sorted(asked.items()) if rows and held[t] < rows]

    def reward_model(self) -> str | None:
        """The name of the model that the pairs here were scored by; None where there are none. Raises DamagedError."""
        path = self.inside(*OWNER.parts)
        if path.exists():
            return files.read_file(path).decode(errors="replace").strip()
        shards = self.shards("pairs")
        return tables.read_metadata(shards[0].path, "pairs").get("reward_model") if shards else None

    def reward_models(self) -> list[str]:
        """The models whose rewards were put together, in the order of the column `rewards`; none where it was one."""
        shards = self.shards("pairs")
        return tables.read_metadata(shards[-1].path, "pairs").get("reward_models", []) if shards else []

    # Paths

    def path(self, kind: str, round: int, unit: str) -> Path:
        """Where the table of a unit stands. Raises DamagedError where links lead out of the data directory."""
        return self.inside(kind, f"round={round:03d}", f"part-{unit}.parquet")

    def record_paths(self, kind: str) -> list[Path]:
        """The commit records of a kind, readable or not."""
        return sorted((self._state / "commits" / kind).glob("round=*/*.json"))

    def manifest_paths(self) -> list[Path]:
        """The settings of all rounds in their order, readable or not."""
        return sorted((self._state / "rounds").glob("round=*.json"), key=lambda path: (len(path.name), path.name))

    def manifest_path(self, round: int) -> Path:
        """Where the settings of a round stand."""
        return self.inside(".ple", "rounds", f"round={round:03d}.json")

    def probe_path(self, round: int) -> Path:
        """Where it stands what tells a round's policy."""
        return self.inside(".ple", "rounds", f"probe-round={round:03d}.json")

    def record_path(self, kind: str, round: int, unit: str) -> Path:
        """Where the commit record of a unit stands."""
        return self.inside(".ple", "commits", kind, f"round={round:03d}", f"{unit}.json")

    def inside(self, *names: str) -> Path:
        """A path in the data directory. Raises DamagedError where links lead out of it."""
        path = self.root.joinpath(*names)
        files.refuse_outside(self.root, path)
        return path

    def _finished_path(self, kind: str, round: int) -> Path:
        return self.inside(".ple", "finished", f"{kind}-round={round:03d}")


def open_store(data: Path) -> Store:
    """The store in a folder that is there. Raises UsageError where it is not, or is a run's, whose rows lie deeper."""
    if not data.is_dir():
        raise UsageError(f"{data}: there is no such folder; give the DATA that ple-gen wrote")
    inside = data / "data"
    if (inside / ".ple").is_dir() and not any((data / kind).exists() for kind in tables.STORED):
        raise UsageError(f"{data}: a run's folder; its rows are in {inside}: give that")
    return Store(data)


def scan_shards(kind: str, shards: Sequence[Shard]) -> "pl.LazyFrame":
    """As `Store.scan`, for shards that were chosen before."""
    import polars as pl

    schema = pl.Schema(tables.SCHEMAS[kind])
    for shard in shards:
        _check_size(shard)
        tables.read_metadata(shard.path, kind)
    if not shards:
        return pl.LazyFrame(schema=schema)
    return scan_files([shard.path for shard in shards], schema=schema, missing_columns="insert")


def asked_as_chat(shard: Shard) -> bool:
    """Whether the queries of a shard were asked as chats, as its writer noted; 0.1.0 did not."""
    return tables.read_metadata(shard.path, shard.kind).get("prompts") == "chat"


def scan_files(paths: Iterable[Path], **how: Any) -> "pl.LazyFrame":
    """The rows of Parquet files as a lazy frame. A path is a path, whatever is in it: no pattern and no address."""
    import polars as pl

    return pl.scan_parquet([path.absolute() for path in paths], glob=False, hive_partitioning=False, **how)


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
    """The rows of a lazy frame over shards, streamed. Raises DamagedError when a file cannot be decoded, PleError when
    the system does not give it.
    """
    from polars.exceptions import PolarsError

    try:
        with files.explained("a shard", "read"):
            return rows.collect(engine="streaming")
    except (PolarsError, OSError, PleError) as error:
        roots = _read_by(rows)
        for store, kind in roots:  # polars does not say in which file a fault is
            for shard in store.shards(kind):
                store.read(shard)
        if isinstance(error, PleError):
            raise
        where = ", ".join(str(store.root) for store, _ in roots)
        raise DamagedError(f"{where}: a shard cannot be read ({first_line(error)}): run `ple verify` there") from error


def _read_by(rows: "pl.LazyFrame") -> list[tuple[Store, str]]:
    """The stores and kinds of table whose files a frame reads, from its plan."""
    return [(Store(root), kind) for root, kind in sorted(set(_SCAN.findall(rows.explain(optimized=False))))]


def _lease_name(kind: str, round: int, unit: str) -> str:
    return f"{kind}-round={round:03d}-{unit}"


def _check_size(shard: Shard) -> None:
    with files.explained(shard.path, "read"):
        size = shard.path.stat().st_size if shard.path.exists() else None
    if size is None:
        raise DamagedError(f"{shard.path}: the file is missing: {tables.RESTORE}")
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
