"""Leases: one holder at a time, whoever dies, stands still or comes from another machine, and without any flock."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ple_data.storage.store import Store
from ple_data.storage.verify import verify
from schemas import files, leases
from schemas.errors import ClaimLostError, DamagedError, PleError
from schemas.holders import Process, named, this_process
from tests.conftest import ROOT
from tests.ple_data.storage.test_store import UNIT, fill, rows_of

ELSEWHERE = {"machine": "0" * 12, "pid": 12, "start": 34, "host": "far", "own": "x", "beat": "0"}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "tmp").mkdir()
    return tmp_path


def take(folder: Path, name: str = "unit") -> leases.Lease | None:
    return leases.take(folder, name, folder / "tmp")


def start(code: str, *arguments: object) -> subprocess.Popen:
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(words, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_one_at_a_time_and_nothing_is_left(folder):
    lease = take(folder)
    assert take(folder) is None
    assert take(folder, "unit.1") is not None  # another one
    assert leases.holder_of(folder, "unit") == str(this_process())
    lease.release()
    assert leases.holder_of(folder, "unit") is None
    again = take(folder)
    again.release()
    assert [path.name for path in folder.iterdir() if path.is_file()] == ["unit.1.1"]
    assert list((folder / "tmp").iterdir()) == []


RACE = """
import os, sys, time
from pathlib import Path
from schemas import leases
folder, turns = Path(sys.argv[1]), 0
end = time.monotonic() + 4
while time.monotonic() < end:
    if lease := leases.take(folder, "unit", folder / "tmp"):
        fd = os.open(folder / "held", os.O_CREAT | os.O_EXCL)  # fails where another one is at it
        os.close(fd)
        turns += 1
        os.unlink(folder / "held")
        if turns % 5:
            lease.release()
        else:  # as if it had died: another process takes over from a holder that is gone
            text = lease.path.read_bytes().replace(str(os.getpid()).encode() + b",", b"999999999,")
            (folder / f"dead-{os.getpid()}").write_bytes(text)
            os.replace(folder / f"dead-{os.getpid()}", lease.path)
            leases._renewals.drop(lease)
print(turns)
"""


def test_of_many_that_take_over_from_the_dead_one_wins(folder):
    racers = [start(RACE, folder) for _ in range(4)]
    turns = [int(racer.communicate()[0]) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4
    assert sum(turns) > 50


def test_the_dead_are_known_at_once_and_swept(folder):
    holder = start(
        "import sys; from pathlib import Path; from schemas import leases; f = Path(sys.argv[1]);"
        "print(leases.take(f, 'unit', f / 'tmp').path, flush=True); sys.stdin.read()",
        folder,
    )
    holder.stdout.readline()
    assert take(folder) is None
    holder.kill()
    holder.communicate()
    ((path, who),) = leases.left_behind(folder)
    assert who.startswith(f"pid {holder.pid} on ")
    leases.remove_dead(folder)
    assert not path.exists()
    assert take(folder) is not None


def test_of_another_machine_only_standing_still_tells(folder, monkeypatch):
    monkeypatch.setattr(leases, "EXPIRE_SECONDS", 0.6)
    path = folder / "unit.7"
    path.write_text(json.dumps(ELSEWHERE))
    for beat in range(4):  # it is renewed
        assert take(folder) is None
        time.sleep(0.3)
        path.write_text(json.dumps(ELSEWHERE | {"beat": str(beat)}))
    assert leases.holder_of(folder, "unit") == "pid 12 on far"
    leases.remove_dead(folder)
    assert path.exists()
    time.sleep(0.7)
    lease = take(folder)
    assert lease.path.name == "unit.8"
    assert not path.exists()


def test_a_lease_is_renewed(folder, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(leases, "_renewals", leases._Renewals())
    lease = take(folder)
    before = lease.path.read_bytes()
    time.sleep(0.5)
    assert json.loads(before)["beat"] < json.loads(lease.path.read_bytes())["beat"]
    lease.release()
    time.sleep(0.2)
    assert not lease.path.exists()


def test_a_lease_that_somebody_came_between_is_renewed_once_they_withdraw(folder, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(leases, "_renewals", leases._Renewals())
    lease = take(folder)
    rival = folder / "unit.2"
    rival.write_text(json.dumps(ELSEWHERE))
    time.sleep(0.5)
    before = lease.path.read_bytes()
    rival.unlink()
    deadline = time.monotonic() + 20
    while lease.path.read_bytes() == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lease.release()


def test_a_lease_that_took_the_name_of_a_dead_one_is_not_swept(folder, monkeypatch):
    path = folder / "unit.1"
    path.write_text(json.dumps(ELSEWHERE))

    def lives(process: Process) -> bool:
        path.write_text(json.dumps(ELSEWHERE | {"own": "another"}))
        return False

    monkeypatch.setattr(Process, "lives", lives)
    leases.remove_dead(folder)
    assert path.exists()


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), PleError("cannot be read")], ids=["OS", "ours"])
def test_a_renewal_that_fails_once_is_made_the_next_time(folder, monkeypatch, error):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(leases, "_renewals", leases._Renewals())
    lease, read, failed = take(folder), leases._read, []

    def once(path: Path) -> bytes:
        if not failed:
            failed.append(lease.path.read_bytes())
            raise error
        return read(path)

    monkeypatch.setattr(leases, "_read", once)
    deadline = time.monotonic() + 20
    while not failed or lease.path.read_bytes() == failed[0]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lease.release()


STOPPED = """
import sys
from schemas import leases
from schemas.errors import ClaimLostError
from ple_data.storage.store import Store
from tests.ple_data.storage.test_store import UNIT, fill
leases.RENEW_SECONDS = 0.1
store = Store(sys.argv[1])
with store.claim("pairs", 0, UNIT) as ours:
    print(ours, flush=True)
    sys.stdin.readline()
    try:
        fill(store)
    except ClaimLostError as error:
        print(error, flush=True)
"""


def test_whoever_stands_still_loses_the_unit_and_commits_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "EXPIRE_SECONDS", 1.0)
    store = Store(tmp_path / "data")
    holder = start(STOPPED, store.root)
    assert holder.stdout.readline() == "True\n"
    holder.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with store.claim("pairs", 0, UNIT) as ours:
            if ours:
                holder.stdin.write("\n")
                holder.stdin.flush()
                holder.send_signal(signal.SIGCONT)
                assert f"pid {os.getpid()} on " in holder.stdout.readline()
                assert not store.is_committed("pairs", 0, UNIT)
                shard = store.commit("pairs", 0, UNIT, rows_of(UNIT, 5), {})
                break
        time.sleep(0.1)
    holder.communicate()
    assert holder.returncode == 0
    assert shard.rows == 5 == store.scan("pairs").collect().height


def test_a_claim_that_was_lost_is_known_at_the_commit(tmp_path):
    store = Store(tmp_path / "data")
    with store.claim("pairs", 0, UNIT) as ours:
        assert ours
        lease = store.root / ".ple" / "leases" / f"pairs-round=000-{UNIT}.2"
        lease.write_text(json.dumps(ELSEWHERE))
        with pytest.raises(ClaimLostError, match="pid 12 on far took over"):
            fill(store)
    assert lease.exists()
    assert [problem for problem in verify(store) if "pid 12 on far" in problem.what]
    assert store.shards("pairs") == []


def test_what_is_no_lease_is_left_alone(folder):
    (folder / "unit.1").write_text("mine")
    with pytest.raises(DamagedError, match="none of ours"):
        take(folder)
    assert (folder / "unit.1").read_text() == "mine"


def test_a_lease_that_lost_its_text_with_the_power_is_over(folder):
    (folder / "unit.1").write_bytes(b"\0" * 200)
    assert take(folder).path.name == "unit.2"


def test_temporary_files_say_whose_they_are(folder):
    writer = this_process()
    name = f"x.{writer.token}-{'0' * 32}{files.TMP_SUFFIX}"
    assert named(name).lives()
    mine, dead = folder / name, folder / name.replace(f"-{writer.pid}-", "-999999999-")
    away, old = folder / name.replace(writer.machine, "0" * 12), folder / f"x.{'1' * 32}.tmp"
    for path in (mine, dead, away, old):
        path.touch()
    assert files.remove_stale(folder) == 1
    assert not dead.exists()
    for path in (mine, away, old):
        os.utime(path, (0, 0))
    assert files.remove_stale(folder) == 2
    assert mine.exists()
