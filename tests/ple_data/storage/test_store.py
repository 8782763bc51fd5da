"""The store: commit, claim, kills between any two steps, two writers, damage found by verify, other
readers.
"""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from ple_data.storage import parquet
from ple_data.storage.store import OWNER, Store, collect
from ple_data.storage.verify import Problem, verify
from schemas import files, tables
from schemas.errors import DamagedError, NewerError, PleError, UsageError
from schemas.holders import this_process
from schemas.records import RoundManifest
from tests.conftest import FIXTURES, ROOT
from tests.tables import table

UNIT = "00000-0123456789ab"


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "data")


def fill(store: Store, round: int = 0, unit: str = UNIT, kind: str = "pairs", rows: int = 3):
    if kind != "pairs":
        store.save_manifest(RoundManifest(round=round, settings={}))
    return store.commit(kind, round, unit, rows_of(unit, rows, round, kind), {"seed": 7})


def rows_of(unit: str, rows: int = 3, round: int = 0, kind: str = "pairs"):
    return table(kind, [{"query_id": f"{unit}-{i}"} for i in range(rows)], round)


def files_of(root: Path, name: str) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in (root / name).rglob("*") if p.is_file())


def errors(store: Store) -> list[Problem]:
    return [problem for problem in verify(store) if problem.severity == "error"]


# Commit and read


def test_a_shard_comes_back(store):
    shard = fill(store)
    assert shard.path == store.root / "pairs" / "round=000" / f"part-{UNIT}.parquet"
    assert (shard.rows, shard.bytes) == (3, shard.path.stat().st_size)
    assert store.shards("pairs") == [shard]
    assert store.read(shard).equals(rows_of(UNIT))
    assert store.read(shard, ["y_ids", "s"]).column_names == ["y_ids", "s"]
    found = store.provenance(shard)
    assert (found["seed"], found["round"], found["unit"], found["kind"]) == (7, 0, UNIT, "pairs")
    assert errors(store) == []
    assert files_of(store.root, ".ple/tmp") == []


def test_a_new_store_touches_nothing(store):
    assert store.shards("pairs") == []
    assert store.scan("pairs").collect().height == 0
    assert store.holder("pairs", 0, UNIT) is None
    assert not store.root.exists()


def test_shards_are_sorted_and_chosen_by_round(store):
    for round, unit in [(1, "00001-bb"), (0, "00010-aa"), (1, "00000-cc"), (2, "00000-dd"), (0, "00002-zz")]:
        fill(store, round, unit)
    names = [(s.round, s.unit) for s in store.shards("pairs")]
    assert names == [(0, "00002-zz"), (0, "00010-aa"), (1, "00000-cc"), (1, "00001-bb"), (2, "00000-dd")]
    assert [s.round for s in store.shards("pairs", max_round=1)] == [0, 0, 1, 1]
    assert [s.unit for s in store.shards("pairs", round=2)] == ["00000-dd"]


def test_scan_sees_committed_rows_of_all_versions(store):
    shard = fill(store)
    old = FIXTURES / "pairs_v1.parquet"
    # an old shard: its bytes and a record of them
    path = store.path("pairs", 1, UNIT)
    path.parent.mkdir()
    path.write_bytes(old.read_bytes())
    values = {"kind": "pairs", "round": 1, "unit": UNIT, "rows": 3, "bytes": path.stat().st_size}
    values |= {"version": 1, "file": path.relative_to(store.root).as_posix(), "sha256": "0" * 64}
    store.record_path("pairs", 1, UNIT).parent.mkdir()
    store.record_path("pairs", 1, UNIT).write_text(json.dumps(values))
    (store.root / "pairs" / "round=000" / "part-stranger.parquet").write_bytes(shard.path.read_bytes())
    rows = store.scan("pairs").collect()
    assert rows.columns == tables.PAIRS.names
    assert rows.height == 6
    assert rows["reference"].to_list() == [None] * 6


def test_the_first_commit_stays(store):
    first = fill(store)
    again = store.commit("pairs", 0, UNIT, rows_of(UNIT, 5), {})
    assert again == first


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([{"s": float("nan")}], "s is not finite in rows 0"),
        ([{"query_id": "a"}, {"query_id": "a"}], "stands there twice"),
        ([{"round": 3}], "another round in rows 0"),
    ],
)
def test_rows_that_are_wrong_are_refused(store, rows, what):
    with pytest.raises(PleError, match=what):
        store.commit("pairs", 0, UNIT, table("pairs", rows), {})
    assert store.shards("pairs") == []


def test_a_table_without_a_column_is_refused(store):
    with pytest.raises(PleError, match="`s_prompt` is missing"):
        store.commit("pairs", 0, UNIT, rows_of(UNIT).drop_columns(["s_prompt"]), {})


# Claims


def test_a_claim_excludes_others_and_names_its_holder(store):
    with store.claim("pairs", 0, UNIT) as ours:
        assert ours
        assert store.holder("pairs", 0, UNIT).startswith(f"pid {os.getpid()} on ")
        with Store(store.root).claim("pairs", 0, UNIT) as second:
            assert not second
        with store.claim("responses", 0, UNIT) as other_kind, store.claim("pairs", 1, UNIT) as other_round:
            assert other_kind
            assert other_round
    assert store.holder("pairs", 0, UNIT) is None
    with store.claim("pairs", 0, UNIT) as again:
        assert again
        fill(store)
    with store.claim("pairs", 0, UNIT) as committed:
        assert not committed


def test_a_claim_is_dropped_when_its_block_raises(store):
    with pytest.raises(RuntimeError), store.claim("pairs", 0, UNIT):
        raise RuntimeError
    with store.claim("pairs", 0, UNIT) as ours:
        assert ours


CLAIM = """
import os, signal, sys
from ple_data.storage.store import OWNER, Store, collect
with Store(sys.argv[1]).claim("pairs", 0, sys.argv[2]) as ours:
    child = os.fork()  # lives on
    if child == 0:
        signal.pause()
    print(ours, os.getpid(), child, flush=True)
    sys.stdin.readline()
print("released", flush=True)
sys.stdin.read()
"""


def start(code: str, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_a_claim_ends_with_its_process_or_block_even_if_a_child_lives_on(store):
    holder = start(CLAIM, store.root, UNIT)
    assert holder.stdin is not None
    assert holder.stdout is not None
    ours, pid, child = holder.stdout.readline().split()
    assert ours == "True"
    assert store.holder("pairs", 0, UNIT).startswith(f"pid {pid} on ")
    with store.claim("pairs", 0, UNIT) as claimed:
        assert not claimed
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "released\n"
    with store.claim("pairs", 0, UNIT) as claimed:
        assert claimed
    os.kill(int(child), signal.SIGKILL)
    holder.kill()
    holder.communicate()


def test_a_killed_holder_frees_the_unit(store):
    holder = start(CLAIM.replace("child = os.fork()", "child = 1"), store.root, UNIT)
    assert holder.stdout is not None
    holder.stdout.readline()
    holder.kill()
    holder.communicate()
    assert store.holder("pairs", 0, UNIT) is None
    with store.claim("pairs", 0, UNIT) as claimed:
        assert claimed


# Kills


KILL = """
import os, signal, sys
from pathlib import Path
import pandas, pyarrow.acero  # what pyarrow imports when it is first used: once here, not in every child
from ple_data.storage.store import OWNER, Store, collect
from tests.ple_data.storage.test_store import UNIT, fill

calls = fatal = 0

def deadly(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

def make(root):
    store = Store(root)
    with store.claim("pairs", 0, UNIT) as ours:
        if ours:
            fill(store)

fork, waitpid = os.fork, os.waitpid
for name in ("open", "fsync", "link", "unlink", "mkdir", "close", "pwrite"):
    setattr(os, name, deadly(getattr(os, name)))
while True:
    fatal += 1
    child = fork()
    if child == 0:
        make(Path(sys.argv[1]) / str(fatal))
        os._exit(0)
    _, status = waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        print(fatal - 1, status)
        break
"""


def test_killed_before_any_step_a_rerun_completes_the_unit(tmp_path):
    """Every system call of a claim and commit is preceded once by kill -9; then the same work is started again.

    Child number n dies before its n-th call; the first that has fewer calls runs to its end.
    """
    found = subprocess.run([sys.executable, "-c", KILL, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    steps, status = map(int, found.stdout.split())
    assert status == 0, found.stderr
    assert steps > 30
    reference = Store(tmp_path / str(steps + 1)).shards("pairs")[0].sha256
    for fatal in range(1, steps + 1):
        store = Store(tmp_path / str(fatal))
        for shard in store.shards("pairs"):  # what is visible is whole
            assert store.read(shard).num_rows == 3
        with store.claim("pairs", 0, UNIT) as ours:
            if ours:
                fill(store)
        assert [shard.sha256 for shard in store.shards("pairs")] == [reference]
        assert errors(store) == []
        assert files_of(store.root, ".ple/tmp") == []
        assert len(files_of(store.root, "pairs")) == 1


def test_a_finished_file_without_its_record_is_adopted_not_made_again(store):
    shard = fill(store)
    store.record_path("pairs", 0, UNIT).unlink()
    assert [p.path for p in errors(store)] == [shard.path]
    with store.claim("pairs", 0, UNIT) as ours:
        assert not ours
    assert store.shards("pairs") == [shard]


@pytest.mark.parametrize("spoil", ["cut", "other unit", "other round", "garbage"])
def test_a_spoilt_file_without_its_record_is_replaced(store, spoil):
    shard = fill(store)
    good = shard.path.read_bytes()
    other = {"other unit": (0, "00001-ff"), "other round": (1, UNIT)}.get(spoil, (2, UNIT))
    bad = {"cut": good[:-5], "garbage": b"garbage"}.get(spoil) or fill(store, *other).path.read_bytes()
    shard.path.write_bytes(bad)
    store.record_path("pairs", 0, UNIT).unlink()
    with store.claim("pairs", 0, UNIT) as ours:
        assert ours
        fill(store)
    assert store.read(store.shards("pairs", round=0)[0]).equals(rows_of(UNIT))


def test_a_newer_file_without_its_record_is_neither_read_nor_removed(store, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "as_written", lambda kind, table: (table, 99))
        shard = fill(store)
    store.record_path("pairs", 0, UNIT).unlink()
    with pytest.raises(NewerError, match="update the program"), store.claim("pairs", 0, UNIT):
        pass
    assert shard.path.exists()


def test_a_committed_unit_whose_file_is_gone_is_not_taken_for_done(store):
    shard = fill(store)
    shard.path.unlink()
    with pytest.raises(DamagedError, match=r"the file is missing: restore it, or remove .*json to redo it"):
        store.is_committed("pairs", 0, UNIT)


# Two writers


WRITER = """
import sys, time
from ple_data.storage.store import OWNER, Store, collect
from tests.ple_data.storage.test_store import fill
store, mine = Store(sys.argv[1]), []
print("ready", flush=True); sys.stdin.readline()
units = [f"{i:05d}-aa" for i in range(40)]
while not all(store.is_committed("pairs", 0, unit) for unit in units):
    for unit in units:
        with store.claim("pairs", 0, unit) as ours:
            if ours:
                fill(store, unit=unit)
                mine.append(unit)
print(*mine)
"""


def test_writers_at_once_share_the_units(store):
    writers = [start(WRITER, store.root) for _ in range(3)]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.readline()
    output = [writer.communicate("\n") for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    made = [unit for out, _ in output for unit in out.split()]
    assert sorted(made) == [f"{i:05d}-aa" for i in range(40)]
    assert errors(store) == []
    assert store.scan("pairs").collect().height == 120


def test_two_that_do_not_claim_still_do_not_overwrite(store, monkeypatch):
    """The second one looks, sees nothing, and finds the name taken when it links."""
    adopt = Store._adopt

    def meanwhile(self, *unit):
        found = adopt(self, *unit)
        monkeypatch.setattr(Store, "_adopt", adopt)
        fill(Store(store.root), rows=5)
        return found

    monkeypatch.setattr(Store, "_adopt", meanwhile)
    with pytest.raises(PleError, match="two processes write this unit"):
        fill(store)
    assert store.shards("pairs")[0].rows == 5


# Disks


def test_a_full_disk_is_one_sentence_and_leaves_nothing(store):
    """A limit on the size of files stands for the full disk: the write itself fails, half-way."""
    code = (
        "import resource, sys; from ple_data.storage.store import Store\n"
        "from tests.ple_data.storage.test_store import fill\n"
        "from schemas.errors import PleError\n"
        "store = Store(sys.argv[1]); fill(store)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: fill(store, round=1)\n"
        "except PleError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code, str(store.root)], cwd=ROOT, capture_output=True, text=True)
    assert f"round=001/part-{UNIT}.parquet: cannot write (File too large): make room" in found.stdout, found.stderr
    assert len(found.stdout.splitlines()) == 1
    assert [shard.round for shard in store.shards("pairs")] == [0]
    assert errors(store) == []
    assert files_of(store.root, ".ple/tmp") == []


def test_a_place_that_is_not_ours_is_one_sentence(tmp_path):
    """Permissions do not bind root, so the child becomes nobody first; one commit before that loads everything."""
    code = (
        "import os, sys; from ple_data.storage.store import Store; from tests.ple_data.storage.test_store import fill\n"
        "from schemas.errors import PleError\n"
        "fill(Store(sys.argv[1]))\n"
        "os.geteuid() or os.setuid(65534)\n"
        "try: fill(Store(sys.argv[2]))\n"
        "except PleError as error: print(error)"
    )
    with tempfile.TemporaryDirectory() as place:  # pytest's own directories are closed to others
        os.chmod(place, 0o555)
        command = [sys.executable, "-c", code, str(tmp_path), place]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        os.chmod(place, 0o755)
    expected = f"{place}: cannot write (Permission denied): the place is read-only or not yours"
    assert expected in found.stdout, found.stderr


def test_a_file_where_the_directory_should_be(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(PleError, match=r"data: cannot write .* move it away"):
        fill(Store(tmp_path / "data"))


# Verify


def damage_cut(store, shard):
    shard.path.write_bytes(shard.path.read_bytes()[:-100])


def damage_flip(store, shard):
    data = bytearray(shard.path.read_bytes())
    data[len(data) // 2] ^= 1
    shard.path.write_bytes(data)


def damage_remove(store, shard):
    shard.path.unlink()


def damage_foreign_table(store, shard):
    pq.write_table(rows_of(UNIT).drop_columns(["s"]), shard.path)


def damage_rows(store, shard):
    """A record without a seal, as 0.1.0 wrote them, with the right hash and the wrong count."""
    path = store.record_path("pairs", 0, UNIT)
    fields = json.loads(path.read_text()) | {"rows": 4, "version": 1}
    path.write_text(json.dumps({name: value for name, value in fields.items() if name != "seal"}))


def damage_record(store, shard):
    store.record_path("pairs", 0, UNIT).write_text("{")


def damage_orphan(store, shard):
    (shard.path.parent / "part-mine.parquet").write_bytes(b"x")


def damage_record_copied(store, shard):
    text = store.record_path("pairs", 0, UNIT).read_text()
    store.record_path("pairs", 0, "00009-copy").write_text(text)


def damage_doubled_key(store, shard):
    store.commit("pairs", 0, "00001-ff", rows_of(UNIT), {})


def damage_manifest(store, shard):
    store.manifest_path(0).write_text("[]")


@pytest.mark.parametrize(
    ("damage", "what", "todo"),
    [
        (damage_cut, "bytes, but", "run the same ple-score"),
        (damage_flip, "altered: its SHA-256", "run the same ple-score"),
        (damage_remove, "the file is missing", "remove it and"),
        (damage_foreign_table, "column `s` (float) is missing", "remove it and"),
        (damage_rows, "3 rows, but 4 were committed", "remove it and"),
        (damage_record, "not a readable Commit record", "remove it"),
        (damage_orphan, "no commit record names this file", "move the file out"),
        (damage_record_copied, "this record belongs at", "put it back"),
        (damage_doubled_key, f"3 keys stand here and in {{root}}/pairs/round=000/part-00001-ff.parquet: "
         f"query_id='{UNIT}-0' round=0 sample=0", "keep one of the files"),
        (damage_manifest, "not a readable RoundManifest record", "remove it"),
    ],
)  # fmt: skip
def test_verify_finds_and_says_what_to_do(store, damage, what, todo):
    shard = fill(store)
    fill(store, kind="responses")
    assert errors(store) == []
    damage(store, shard)
    problems = errors(store)
    assert any(what.format(root=store.root) in str(p) and todo in str(p) for p in problems), problems
    assert len(problems) <= 2  # a size that is wrong, and what that did to the table
    assert all("\n" not in str(problem) for problem in problems)


def test_what_verify_says_repairs_the_unit(store):
    shard = fill(store)
    damage_cut(store, shard)
    with pytest.raises(DamagedError, match="ple verify"):
        store.read(shard)
    shard.path.unlink()
    store.record_path("pairs", 0, UNIT).unlink()
    with store.claim("pairs", 0, UNIT) as ours:
        assert ours
        assert fill(store) == shard
    assert errors(store) == []


def test_verify_tells_what_is_no_fault(store):
    fill(store, kind="responses")
    fill(store, 1)
    leftover = store.root / ".ple" / "tmp" / f"x.{this_process().machine}-999999999-1-{'0' * 32}.tmp"
    leftover.write_bytes(b"half")
    said = [(p.severity, p.what) for p in verify(store)]
    assert said == [
        ("info", "an unfinished file of a process that was killed"),
        ("info", "round 0: 1 units of responses that are not scored yet"),
        ("info", "round 1: 1 units of pairs without their responses"),
    ]


def test_verify_lets_a_commit_in_work_be(store):
    shard = fill(store)
    fill(store, kind="responses")
    record = store.record_path("pairs", 0, UNIT)
    text = record.read_text()
    with store.claim("pairs", 0, UNIT):
        record.unlink()
        assert errors(store) == []
    assert [p.path for p in errors(store)] == [shard.path]
    record.write_text(text)


def test_verify_of_nothing(tmp_path):
    (tmp_path / "pairs").mkdir()
    with pytest.raises(UsageError, match="not a data directory"):
        next(verify(Store(tmp_path)))


def test_verify_of_a_copy_without_its_records(store):
    shard = fill(store)
    (store.root / ".ple").rename(store.root.parent / "elsewhere")
    assert [p.path for p in errors(store)] == [shard.path]


def test_any_flipped_bit_is_found_and_never_read_as_something_else(store):
    shard = fill(store, rows=20)
    good, rows = shard.path.read_bytes(), store.read(shard)
    for place in range(0, len(good), 23):
        data = bytearray(good)
        data[place] ^= 1 << place % 8
        shard.path.write_bytes(data)
        assert any("SHA-256" in p.what for p in verify(store)), place
        try:
            assert store.read(shard).equals(rows), place
        except DamagedError:
            continue


@pytest.mark.parametrize("name", ["unit", "file", "round"])
@pytest.mark.parametrize("value", ["../../kept", "/etc/passwd", "a/../../b", "..", -1, 10**30])
def test_a_record_never_leads_to_another_place(store, tmp_path, name, value):
    """Also one of an older version, which has no seal."""
    fill(store)
    path = store.record_path("pairs", 0, UNIT)
    fields = json.loads(path.read_text()) | {name: value, "version": 1}
    del fields["seal"]
    path.write_text(json.dumps(fields))
    before = files_of(tmp_path, ".")
    with pytest.raises(DamagedError, match=UNIT):
        store.shards("pairs")
    assert [p.path for p in errors(store)] == [path]
    assert files_of(tmp_path, ".") == before


@pytest.mark.parametrize("folder", ["pairs", "pairs/round=000", ".ple", ".ple/commits", ".ple/tmp", ".ple/leases"])
def test_a_folder_that_is_a_link_elsewhere_is_neither_read_nor_written(store, tmp_path, folder):
    fill(store)
    place = store.root / folder
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    before = files_of(tmp_path, "elsewhere")
    with pytest.raises(DamagedError, match="links lead to"):
        fill(Store(store.root), unit="00001-ff")
    assert [p.path for p in errors(store)] == [place]
    assert files_of(tmp_path, "elsewhere") == before


@pytest.mark.parametrize("text", ["", "p", "pid 12", "pid 12 o", "pid 12 on host"])
def test_a_lock_whose_text_was_cut_short_is_a_lock(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    with files.locked(tmp_path / "lock"):
        assert (tmp_path / "lock").read_text() == f"pid {os.getpid()} on {socket.gethostname()}"


@pytest.mark.parametrize("text", ["mine", "pid x on host", "pidfile", "12"])
def test_what_is_no_text_of_a_lock_is_none(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    with pytest.raises(DamagedError, match="none of ours"), files.locked(tmp_path / "lock"):
        pass
    assert (tmp_path / "lock").read_text() == text


def test_a_file_in_place_of_a_lease_is_left_as_it_is(store, tmp_path):
    fill(store)
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")
    lease = store.root / ".ple" / "leases" / f"pairs-round=000-{UNIT}.1"
    for make in (lease.symlink_to, lease.hardlink_to, lambda _: lease.mkdir()):
        make(kept)
        with pytest.raises(PleError, match=r"\.1: "), store.claim("pairs", 0, UNIT):
            pass
        assert lease.exists()
        lease.rmdir() if lease.is_dir() else lease.unlink()
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("name", ["d[1]", "d*", "d?", "{d}", "~", "file:d"])
def test_a_path_is_no_pattern(tmp_path, monkeypatch, name):
    """Beside stores that these names would mean as patterns or addresses."""
    monkeypatch.chdir(tmp_path)
    for other in ("d1", "d"):
        fill(Store(other), rows=5)
    store = Store(name)
    fill(store)
    fill(store, kind="responses")
    assert collect(store.scan("pairs")).height == 3
    assert errors(store) == []


def test_a_name_that_is_no_text_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match="no UTF-8"):
        Store(tmp_path / os.fsdecode(b"d\xff"))


def finished(store: Store) -> list[str]:
    units = [f"0000{n}-{'a' * 12}" for n in range(3)]
    manifest = RoundManifest(round=0, settings={"samples": 3}, counts={"queries_taken": 3})
    store.save_manifest(manifest)
    for kind in ("responses", "pairs"):
        for unit in units:
            fill(store, unit=unit, kind=kind)
        store.finish(kind, 0)
    (store.root / OWNER).write_text(f"{store.read(store.shards('pairs')[0])['reward_model'][0]}\n")
    assert list(verify(store)) == []
    return units


@pytest.mark.parametrize("kind", ["responses", "pairs"])
def test_verify_misses_a_unit_that_is_lost_with_its_record(store, kind):
    unit = finished(store)[1]
    store.path(kind, 0, unit).unlink()
    store.record_path(kind, 0, unit).unlink()
    (found,) = errors(store)
    assert f"round 0 was finished with 3 units of {kind}, and 2 are there: one was lost with its record" in str(found)


def test_verify_misses_a_whole_round_also_without_its_settings(store):
    for unit in finished(store):
        for kind in ("responses", "pairs"):
            store.path(kind, 0, unit).unlink()
            store.record_path(kind, 0, unit).unlink()
    store.manifest_path(0).unlink()
    assert [found.what for found in errors(store)] == [
        f"round 0 was finished with 3 units of {kind}, and 0 are there" for kind in ("responses", "pairs")
    ]


def test_a_mark_of_a_finished_round_that_is_damaged_is_said(store):
    finished(store)
    (store.root / ".ple" / "finished" / "pairs-round=000").write_text("three")
    (found,) = errors(store)
    assert ("no number of units" in found.what, "remove it" in found.todo) == (True, True)


def test_units_that_come_to_a_finished_round_count_too(store):
    finished(store)
    fill(store, unit="00009-ff", kind="pairs")
    store.finish("pairs", 0)
    assert (store.finished_units("pairs", 0), store.finished_units("responses", 0)) == (4, 3)


def test_a_round_that_is_finished_keeps_nothing_of_killed_writers(store):
    finished(store)
    left = store.root / ".ple" / "tmp" / f"00000-aa.json.{this_process().machine}-999999999-1-{'0' * 32}.tmp"
    left.write_text("{")
    store.finish("pairs", 0)
    assert not left.exists()


def test_verify_finds_a_unit_of_another_reward_model(store):
    finished(store)
    rows = [{"query_id": "alien", "reward_model": "other@1"}]
    store.commit("pairs", 0, "00009-ff", table("pairs", rows), {})
    (found,) = errors(store)
    assert "its pairs were scored by other@1, but those of this store by judge@0123456789ab" in found.what


def test_verify_finds_a_unit_that_nobody_asked_for(store):
    finished(store)
    fill(store, unit="00009-ff", kind="responses")
    (found,) = errors(store)
    assert "put there by hand" in found.todo


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_text(
    path.read_text().replace('"samples": 3', '"samples": 2'))])  # fmt: skip
def test_verify_finds_settings_of_a_round_that_are_gone_or_changed(store, change):
    finished(store)
    change(store.manifest_path(0))
    (found,) = errors(store)
    assert found.path == store.manifest_path(0)
    assert "are gone" in found.what or "changed since it was written" in found.what


def test_verify_says_what_an_unfinished_round_lacks(store):
    store.save_manifest(RoundManifest(round=0, settings={"samples": 2}, counts={"queries_taken": 5}))
    fill(store, kind="responses")
    assert any("but was asked for 10 rows" in p.what and p.severity == "info" for p in verify(store))


def test_verify_shows_each_finding_as_it_is_found(store, monkeypatch):
    first, second = fill(store), fill(store, 1)
    first.path.unlink()
    read: list[Path] = []
    monkeypatch.setattr("ple_data.storage.verify.sha256_file", lambda path: read.append(path) or second.sha256)
    found = next(problem for problem in verify(store) if problem.path == first.path)
    assert "the file is missing" in found.what
    assert read == []


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ENOLCK])
def test_what_the_system_says_is_no_damage(store, monkeypatch, number):
    """A message says it, with the file's name and exit code 1."""
    shard = fill(store)

    def fails(*_):
        raise OSError(number, os.strerror(number))

    readings = {
        "schemas.tables.pa.OSFile": lambda: store.read(shard),
        "pathlib.Path.read_bytes": lambda: store.shards("pairs"),
        "schemas.leases.os.link": lambda: store.claim("pairs", 5, UNIT).__enter__(),
    }
    for place, read in readings.items():
        with monkeypatch.context() as broken:
            broken.setattr(place, fails)
            broken.setattr("ple_data.storage.store.read_quickly", lambda *_: [(store.record_paths("pairs")[0], None)])
            with pytest.raises(PleError, match=os.strerror(number)) as caught:
                read()
        assert (caught.value.exit_code, UNIT in str(caught.value)) == (1, True)


def test_a_shard_that_polars_cannot_read_is_named(store):
    fill(store, 1)
    shard = fill(store)
    rows = store.scan("pairs")
    shard.path.write_bytes(shard.path.read_bytes()[:-300])
    with pytest.raises(DamagedError, match=shard.path.name):
        collect(rows)


def test_the_store_that_is_blamed_is_the_one_that_was_read(store, tmp_path):
    """Another one, scanned before and damaged since, has nothing to do with it."""
    other = Store(tmp_path / "other")
    lost = fill(other)
    other.scan("pairs")
    lost.path.unlink()
    fill(store)
    with pytest.raises(DamagedError, match=rf"^{store.root}: a shard cannot be read"):
        collect(store.scan("pairs").select(pl.col("x").cast(pl.Int64)))


# Settings of a round


def test_settings_come_in_the_order_of_their_rounds(store):
    rounds = [0, 2, 10, 999, 1000, 1001, 10000]
    for round in rounds[::-1]:
        store.save_manifest(RoundManifest(round=round, settings={}))
    assert store.manifest_paths() == [store.manifest_path(round) for round in rounds]


def test_the_first_manifest_stands(store):
    assert store.load_manifest(0) is None
    first = RoundManifest(round=0, settings={"seed": 0}, counts={"read": 3})
    assert store.save_manifest(first) == first
    assert store.save_manifest(RoundManifest(round=0, settings={"seed": 1})) == first
    assert store.load_manifest(0) == first
    assert store.load_manifest(1) is None


# Readers that know nothing of us


@pytest.fixture
def two_rounds(store) -> Path:
    fill(store, 0)
    fill(store, 1)
    return store.root


ALWAYS_THERE = [field.name for field in tables.PAIRS if tables.since(field) <= tables.ALWAYS]


def test_polars_reads_pairs_unaided(two_rounds):
    rows = pl.scan_parquet(f"{two_rounds}/pairs/**/*.parquet").collect()
    assert rows.columns == ALWAYS_THERE
    assert rows["round"].to_list() == [0, 0, 0, 1, 1, 1]
    assert rows["round"].dtype == pl.Int32
    assert rows["y_prompt_ids"].to_list() == [[10, 11, 12, 1]] * 6


def test_duckdb_reads_pairs_unaided(two_rounds):
    """DuckDB takes `round` from the path, as text '000', unless it is told not to."""
    import duckdb

    source = f"'{two_rounds}/pairs/**/*.parquet'"
    assert duckdb.sql(f"select count(*), sum(s_prompt - s) from {source}").fetchall() == [(6, 4.5)]
    assert duckdb.sql(f"select y_ids from {source} where round = 1 limit 1").fetchall() == [([8, 9, 1],)]
    numbers = f"read_parquet({source}, hive_partitioning=false)"
    assert duckdb.sql(f"select distinct round from {numbers} where round >= 1").fetchall() == [(1,)]


def test_datasets_reads_pairs_unaided(two_rounds, tmp_path):
    import datasets

    rows = datasets.load_dataset(
        "parquet",
        data_files=f"{two_rounds}/pairs/**/*.parquet",
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert sorted(rows.column_names) == sorted(ALWAYS_THERE)
    assert rows["round"][:] == [0, 0, 0, 1, 1, 1]
    assert rows[0]["y_ids"] == [8, 9, 1]


def test_pyarrow_and_pandas_read_a_file_and_with_one_option_a_directory(two_rounds):
    import pandas as pd
    import pyarrow.dataset as ds

    file = two_rounds / "pairs" / "round=001" / f"part-{UNIT}.parquet"
    assert pq.read_table(file)["round"].to_pylist() == [1, 1, 1]
    assert pd.read_parquet(file)["round"].tolist() == [1, 1, 1]
    assert ds.dataset(two_rounds / "pairs").to_table()["round"].to_pylist() == [0, 0, 0, 1, 1, 1]
    assert pd.read_parquet(two_rounds / "pairs", partitioning=None)["round"].tolist() == [0, 0, 0, 1, 1, 1]
