"""`ple verify`: everything that can be wrong in a data directory, and what to do about each. Changes nothing.

Every shard is hashed and read whole, one at a time; keys are compared one round at a time.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from ple_data.storage.store import Shard, Store, open_store, scan_files
from schemas import tables
from schemas.errors import DamagedError, UsageError
from schemas.files import TMP_SUFFIX, is_stale, refuse_outside, sha256_file
from schemas.records import VERIFY

_NAMED = 5  # doubled keys that one problem names

_REMAKE = {
    "responses": "run the same ple-gen command again to sample this unit anew",
    "pairs": "run the same ple-score (or ple-gen --reward-model) command again; its responses are not sampled again",
    "rewards": "run the same ple-score command again to score this unit anew",
    "answers": "run the same ple eval command again to sample this unit anew",
}


@dataclass(frozen=True)
class Problem:
    """One finding: where, what is wrong, what to do. `severity` is "error" or "info" (nothing is wrong)."""

    path: Path
    what: str
    todo: str
    severity: str = "error"

    def __str__(self) -> str:
        return f"{self.severity}: {self.path}: {self.what}: {self.todo}"


def check(directory: Path) -> Iterator[Problem]:
    """Every problem of a data directory, as it is found. Raises DamagedError behind the last where one is an error."""
    errors = 0
    for problem in verify(open_store(directory)):
        errors += problem.severity == "error"
        yield problem
    if errors:
        problems = "1 problem" if errors == 1 else f"{errors} problems"
        raise DamagedError(f"{directory}: {problems}, listed above with what to do")


def held(directory: Path) -> str:
    """How many rows of which kind are committed, in words."""
    store = Store(directory)
    rows = {kind: sum(shard.rows for shard in store.shards(kind)) for kind in tables.STORED}
    return ", ".join(f"{count} rows of {kind}" for kind, count in rows.items() if count) or "no rows yet"


def verify(store: Store) -> Iterator[Problem]:
    """All problems of a data directory, as they are found. Raises UsageError where it is none."""
    tables_there = (path for kind in tables.STORED for path in (store.root / kind).rglob("*.parquet"))
    if not (store.root / ".ple").is_dir() and not any(tables_there):
        raise UsageError(f"{store.root}: not a data directory: it has neither .ple nor responses nor pairs")
    if links := list(_links(store)):
        yield from links  # what lies behind them is not looked at
        return
    asked: dict[int, int] = {}
    yield from _manifests(store, asked)
    for kind in tables.STORED:
        yield from _of_kind(store, kind, asked)
    for own in sorted((store.root / ".ple" / "rewards").glob("*")):  # of each of several reward models
        yield from _of_kind(Store(own), "rewards", {})
    yield from _leftovers(store)
    yield from _unscored(store)


def _of_kind(store: Store, kind: str, asked: Mapping[int, int]) -> Iterator[Problem]:
    """What is wrong with the tables of a kind and their records."""
    shards: list[Shard] = []
    yield from _records(store, kind, shards)
    yield from _orphans(store, kind)
    whole, owner = [], None
    with suppress(DamagedError):  # said above
        owner = store.reward_model()
    for shard in shards:
        if faults := list(_faults(shard, owner)):
            record = store.record_path(kind, shard.round, shard.unit)
            remake = f"restore it from a copy, or remove it and {record}, then {_REMAKE[kind]}"
            yield Problem(shard.path, "; ".join(faults), remake)
        else:
            whole.append(shard)
    yield from _doubled_keys(kind, whole)
    yield from _counts(store, kind, shards, asked)


def _links(store: Store) -> Iterator[Problem]:
    """Links that lead out of the data directory."""
    for top in (store.root / name for name in (".ple", *tables.STORED)):
        for path in (path for path in (top, *top.rglob("*")) if path.is_symlink()):
            try:
                refuse_outside(store.root, path)
            except DamagedError as error:
                yield Problem(path, *_without_path(error, path).rsplit(": ", 1))


def _records(store: Store, kind: str, shards: list[Shard]) -> Iterator[Problem]:
    """Unreadable or misplaced commit records; the shards of the good ones are added to `shards`."""
    for path in store.record_paths(kind):
        try:
            shards.append(store.read_record(path))
        except DamagedError as error:
            yield Problem(path, _without_path(error, path), f"remove it; then {_REMAKE[kind]}")


def _orphans(store: Store, kind: str) -> Iterator[Problem]:
    """Parquet files beside the shards that no commit record names; those just being committed do not count."""
    recorded = {store.path(kind, *unit) for unit in _recorded(store, kind)}
    todo = f"if a command was killed, {_REMAKE[kind]}; otherwise move the file out of the data directory"
    for path in sorted((store.root / kind).rglob("*.parquet")):
        if path not in recorded and not _in_work(store, kind, path):
            yield Problem(path, "no commit record names this file, yet other programs read it with the rest", todo)


def _in_work(store: Store, kind: str, path: Path) -> bool:
    round, unit = path.parent.name.removeprefix("round="), path.stem.removeprefix("part-")
    return round.isdecimal() and store.holder(kind, int(round), unit) is not None


def _recorded(store: Store, kind: str) -> set[tuple[int, str]]:
    """(round, unit) of the commit records, readable or not."""
    names = [(path.parent.name.removeprefix("round="), path.stem) for path in store.record_paths(kind)]
    return {(int(round), unit) for round, unit in names if round.isdecimal()}


def _faults(shard: Shard, owner: str | None) -> Iterator[str]:
    """Whether the file is there, is the one that was committed, and holds what a table of its kind must."""
    try:
        size = shard.path.stat().st_size
    except OSError as error:
        yield f"the file is missing ({error.strerror})"
        return
    if size != shard.bytes:
        yield f"{size} bytes, but {shard.bytes} were committed"
    elif (sha256 := sha256_file(shard.path)) != shard.sha256:
        yield f"altered: its SHA-256 is {sha256}, but {shard.sha256} was committed"
    try:
        found = tables.read_metadata(shard.path, shard.kind)
        table = tables.read_table(shard.path, shard.kind)
    except DamagedError as error:
        yield _without_path(error, shard.path).removesuffix(f": {tables.RESTORE}")
        return
    if (found.get("round"), found.get("unit")) != (shard.round, shard.unit):
        yield f"holds unit {found.get('unit')} of round {found.get('round')}, not {shard.unit} of {shard.round}"
    if table.num_rows != shard.rows:
        yield f"{table.num_rows} rows, but {shard.rows} were committed"
    yield from tables.row_faults(shard.kind, table, shard.round)
    if owner and shard.kind == "pairs" and (others := set(table["reward_model"].to_pylist()) - {owner}):
        yield f"its pairs were scored by {', '.join(others)}, but those of this store by {owner}"


def _counts(store: Store, kind: str, shards: Sequence[Shard], asked: Mapping[int, int]) -> Iterator[Problem]:
    """Rounds with fewer units than they were finished with, or other than as many rows as they were asked for."""
    recorded = Counter(round for round, _ in _recorded(store, kind))
    finished: dict[int, int] = {}
    for round in store.finished_rounds(kind):
        try:
            finished[round] = store.finished_units(kind, round)
        except DamagedError as error:
            yield Problem(store.root, *str(error).rsplit(": ", 1))
    for round, units in finished.items():
        if units > recorded[round]:
            what = f"round {round} was finished with {units} units of {kind}, and {recorded[round]} are there"
            todo = f"one was lost with its record: restore both from a copy, or {_REMAKE[kind]}"
            yield Problem(store.root / kind, what, todo)
    if kind == "pairs":  # those of several stores may be scored into one
        return
    for round, rows in asked.items():
        held = [shard.rows for shard in shards if shard.round == round]
        what = f"round {round} holds {sum(held)} rows of {kind} in {len(held)} units, but was asked for {rows} rows"
        if sum(held) > rows:
            yield Problem(store.root / kind, what, "units were put there by hand: remove their files and records")
        elif held and sum(held) < rows and round not in finished:
            yield Problem(store.root / kind, what, "if it has not come to its end, run the command again", "info")


def _doubled_keys(kind: str, shards: Iterable[Shard]) -> Iterator[Problem]:
    """(query_id, round, sample) keys that stand in more than one file; `shards` are whole and sorted by round."""
    import polars as pl

    for _, group in groupby(shards, key=lambda shard: shard.round):
        files = {str(shard.path.absolute()): str(shard.path) for shard in group}
        keys = scan_files(map(Path, files), include_file_paths="file")
        doubled = (
            keys.select(*tables.KEY, "file")
            .group_by(tables.KEY)
            .agg(pl.col("file").unique().sort(), pl.len().alias("rows"))
            .filter(pl.col("rows") > 1)
            .group_by("file")
            .agg(pl.len().alias("keys"), *[pl.col(name).sort_by(tables.KEY).head(_NAMED) for name in tables.KEY])
            .sort("file")
            .collect(engine="streaming")
        )
        for row in doubled.iter_rows(named=True):
            first, *others = (files[path] for path in row["file"])
            named = "; ".join(
                f"query_id={q!r} round={r} sample={s}" for q, r, s in zip(*(row[k] for k in tables.KEY), strict=True)
            )
            more = f" and {row['keys'] - _NAMED} more" if row["keys"] > _NAMED else ""
            what = f"{row['keys']} keys stand here and in {', '.join(others)}: {named}{more}"
            todo = "stores were merged or a record was copied: keep one of the files and remove the others' records"
            yield Problem(Path(first), what, f"{todo} under .ple/commits/{kind} with the files themselves")


def _manifests(store: Store, asked: dict[int, int]) -> Iterator[Problem]:
    """Settings of rounds that do not read, or are gone. `asked` is given the rows that the others were asked for."""
    again = "restore it from a copy, or remove it and run the same ple-gen (or ple eval) command again"
    for path in store.manifest_paths():
        try:
            manifest = store.read_manifest(path)
            if manifest.rows is not None:
                asked[manifest.round] = manifest.rows
        except DamagedError as error:
            yield Problem(path, _without_path(error, path), again)
    for round in sorted({round for kind in ("responses", "answers") for round, _ in _recorded(store, kind)}):
        if not (path := store.manifest_path(round)).exists():
            yield Problem(path, f"the settings of round {round} are gone", again)


def _leftovers(store: Store) -> Iterator[Problem]:
    for path in sorted((store.root / ".ple" / "tmp").glob(f"*{TMP_SUFFIX}")):
        if is_stale(path):
            todo = "nothing to do: the next command that writes here removes it"
            yield Problem(path, "an unfinished file of a process that was killed", todo, "info")
    for path, holder in store.left_behind():
        what = f"a claim of {holder}, which is dead or on another machine"
        yield Problem(path, what, "nothing to do: it ends a minute after its holder", "info")


def _unscored(store: Store) -> Iterator[Problem]:
    """Units with responses and no pairs, and pairs whose responses are elsewhere: neither is wrong."""
    responses, pairs = _recorded(store, "responses"), _recorded(store, "pairs")
    elsewhere = "nothing to do if they were scored from another directory"
    for missing, what, todo in (
        (responses - pairs, "responses that are not scored yet", "run ple-score"),
        (pairs - responses, "pairs without their responses", elsewhere),
    ):
        for round, units in groupby(sorted(missing), key=lambda unit: unit[0]):
            yield Problem(store.root, f"round {round}: {len(list(units))} units of {what}", todo, "info")


def _without_path(error: DamagedError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ").removesuffix(f": {VERIFY}")
