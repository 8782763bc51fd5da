"""Workers on a real cluster of Ray: the rows of one process, whoever dies; and one sentence for what cannot work."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ple_data.common import workers as room
from ple_data.common.progress import Progress
from ple_data.common.workers import Pool, Wanted
from ple_data.engines import Completion, Request, Sampling
from ple_data.sampling.generate import generate
from ple_data.sampling.workers import _Counted, gpus_of
from ple_data.scoring.score import score
from ple_data.scoring.workers import WorkersReward
from ple_data.storage.store import Store
from ple_data.storage.verify import verify
from schemas.errors import PleError, UsageError
from schemas.options import Gen, Rewards
from tests import tiny
from tests.conftest import ROOT

ray = pytest.importorskip("ray")


@pytest.fixture
def run(policy: Path, tmp_path: Path) -> Any:
    """generate() into `tmp_path / name`, 24 queries in units of 4."""
    queries = tmp_path / "q.jsonl"
    queries.write_text("".join(json.dumps({"id": f"q{n}", "x": x}) + "\n" for n, x in enumerate(tiny.corpus()[:24])))

    def call(data: str, **options: Any) -> Any:
        given = {"model": str(policy), "principles": "imdb", "round": 0, "max_new_tokens": 8, "unit_size": 4}
        given |= {"engine": "hf", "dtype": "float32", "queries": str(queries)}
        return generate(Gen(data=tmp_path / data, **given | options))

    return call


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The address of a cluster of two machines with 2 cores and 4 GPUs (in name) each, and its processes' mark."""
    from ray.cluster_utils import Cluster

    machine = {"num_cpus": 2, "num_gpus": 4}
    with pytest.MonkeyPatch.context() as environment:
        mark = str(tmp_path_factory.mktemp("cluster"))
        for name, value in {"PLE_TEST_MARK": mark, "SPT_NOENV": "1", "PYTHONPATH": str(ROOT), **room.QUIET}.items():
            environment.setenv(name, value)
        machines = Cluster(initialize_head=True, head_node_args={**machine, "include_dashboard": False})
        machines.add_node(**machine)
        yield machines.address, mark
        machines.shutdown()


def rows(data: Path, kind: str = "responses") -> pl.DataFrame:
    store = Store(data)
    assert [str(problem) for problem in verify(store) if problem.severity == "error"] == []
    return store.scan(kind).collect().sort("query_id", "sample")


def test_gen_and_score_by_two_workers_give_the_rows_of_one_process(
    run: Any, adapter: Path, reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And while they sample, the progress hears of tokens of units that are not whole."""
    heard: list[int] = []
    monkeypatch.setattr(room, "LOOK", 0.01)
    shutil.copytree(adapter, tmp_path / "trained")
    (tmp_path / "trained/.ple").mkdir()  # as ple-train leaves it
    run("one", adapter=str(tmp_path / "trained"))
    monkeypatch.setattr(Progress, "under_way", lambda _, tokens: heard.append(tokens))
    summary = run("two", adapter=str(tmp_path / "trained"), workers=2)
    assert 0 < max(heard) <= 2 * 2 * 8 * 8  # pieces that two workers have, each of 4 queries and both arms
    assert summary.rows_sampled == 24
    assert rows(tmp_path / "two").equals(rows(tmp_path / "one"))
    made_by = Store(tmp_path / "two").provenance(Store(tmp_path / "two").shards("responses")[0])
    assert (made_by["dtype"], made_by["device"]) == ("float32", "2 workers, cpu")
    from ple_data.rewards import load_reward_model

    score(Store(tmp_path / "one"), load_reward_model(str(reward)))
    workers = WorkersReward(str(reward), Rewards(), Wanted(2), print)
    try:
        score(Store(tmp_path / "two"), workers)
    finally:
        workers.close()
    found, expected = (rows(tmp_path / name, "pairs") for name in ("two", "one"))
    assert found.equals(expected)


def test_tokens_under_way_are_those_of_units_that_are_not_whole() -> None:
    seen = []

    class Engine:
        under_way: Any

        def sample(self, units: Any, sampling: Sampling) -> Any:
            for at, length in enumerate((3, 2)):
                self.under_way(5 - 3 * at)
                seen.append(counted.tokens())
                yield Request(at, (), 0), Completion([0] * length, "", "stop", None)

    counted = _Counted(Engine())  # type: ignore[arg-type]
    found = []
    for _, completion in counted.sample(iter([]), Sampling(max_new_tokens=8)):
        found.append(completion)
        seen.append(counted.tokens())
    counted.forget(found)
    assert (seen, counted.tokens()) == ([5, 5, 5, 5], 0)


DEADLY = """
import os, pathlib, sys
def reward(xs, ys):
    here = pathlib.Path(__file__).parent
    if {query!r} in xs:
        with (here / "deaths").open("a") as deaths:
            deaths.write("x")
        if {always} or (here / "deaths").stat().st_size < 2:
            print("out of paper", file=sys.stderr)
            os._exit(1)
    return [float(len(y)) for y in ys]
"""


@pytest.mark.parametrize("always", [False, True])
def test_a_worker_that_dies_is_replaced_and_what_kills_three_is_named(
    run: Any, tmp_path: Path, always: bool, capsys: Any
) -> None:
    run("data")
    (tmp_path / "deadly.py").write_text(DEADLY.format(query=tiny.corpus()[13], always=always))
    workers = WorkersReward(f"{tmp_path / 'deadly.py'}:reward", Rewards(), Wanted(2), print)
    store = Store(tmp_path / "data")
    try:
        if always:
            sentence = (
                r"unit 00003-\w+ of round 0: 3 workers died over it, .*: its last words: out of paper\); what was"
            )
            with pytest.raises(PleError, match=sentence):
                score(store, workers)
            assert (tmp_path / "deaths").read_text() == "xxx"
            assert rows(tmp_path / "data", "pairs").height >= 8
        else:
            score(store, workers)
            assert rows(tmp_path / "data", "pairs").height == 24
    finally:
        workers.close()
    said = capsys.readouterr()
    assert "its last words: out of paper): its work goes to others" in said.err
    assert said.out == ""


@pytest.mark.long
def test_what_cannot_work_is_one_sentence(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"--ray 127.0.0.1:1: no cluster of Ray there \(.*refused"):
        run("a", workers=1, ray="127.0.0.1:1")
    (tmp_path / "bad.py").write_text("def reward(pairs):\n    return []\n\n1 / 0")
    with pytest.raises(PleError, match=r"bad\.py.*ZeroDivisionError.*\(on "):
        WorkersReward(f"{tmp_path / 'bad.py'}:reward", Rewards(), Wanted(1), print)
    leaves = "import os, sys\nreward = print\nprint('no paper', file=sys.stderr)\nos._exit(1)"
    (tmp_path / "bad.py").write_text(leaves)
    with pytest.raises(PleError, match=r"a worker died at its start 3 times \(process \d+ of .*words: no paper\)$"):
        WorkersReward(f"{tmp_path / 'bad.py'}:reward", Rewards(), Wanted(1), print)
    with pytest.raises(UsageError, match=r"--workers 999: there is room for \d+ \(.* takes 1 CPU\); ask for fewer$"):
        run("a", workers=999)
    with pytest.raises(UsageError, match="give one of them"):
        run("a", workers=2, endpoint=("http://127.0.0.1:1",), engine=None)
    monkeypatch.setitem(sys.modules, "here_alone", module := types.ModuleType("here_alone"))
    exec("def make(): pass", module.__dict__)
    with pytest.raises(PleError, match=r"a worker failed: .*No module named 'here_alone'"):
        Pool(module.make, Wanted(1), print)


def test_an_engine_has_as_many_gpus_as_its_arguments_say_and_a_machine_must_have_them(
    cluster: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}
    assert gpus_of(asked) == 8
    assert [gpus_of(some) for some in ({}, {"device": "cpu"}, {"tensor_parallel_size": "x"})] == [1, 0, 1]
    monkeypatch.setattr(room, "LONGEST", 6.0)
    monkeypatch.setattr(room, "PATIENCE", 1.0)
    said: list[str] = []
    with pytest.raises(PleError, match=r"found no room for any in .*8 GPUs and 4 cores on 2 nodes\); free some"):
        Pool(print, Wanted(3, cluster[0], gpus_of(asked)), said.append)  # 4 and 4 are not 8
    assert said[0].startswith("--workers 3: there is room for 0 (8 GPUs and 4 cores on 2 nodes; a worker takes 8 GPU")
    assert said[1].startswith("no worker yet")


@pytest.fixture
def driver(policy: Path, run: Any, tmp_path: Path) -> Iterator[Any]:
    """driver(*words): `ple gen` with these as a process of its own, once it has committed something."""
    words = ["-m", "cli", "gen", "--model", str(policy), "--queries", str(tmp_path / "q.jsonl"), "--principles", "imdb"]
    words += ["--round", "0", "--max-new-tokens", "8", "--unit-size", "4", "--engine", "hf", "--samples", "16"]
    words += ["--dtype", "float32", "--data", str(tmp_path / "data")]
    started: list[subprocess.Popen[str]] = []

    def start(
        *more: str, python: str = sys.executable, workers: tuple[str, ...] = ("--workers", "2")
    ) -> subprocess.Popen[str]:
        environment = {**os.environ, "PLE_TEST_MARK": str(tmp_path)}
        command = [python, *words, *workers, *more]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        while process.poll() is None and not Store(tmp_path / "data").shards("responses"):
            time.sleep(0.05)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def gone(mark: str, what: str = "") -> None:
    """Wait until no process has the mark."""
    deadline = time.monotonic() + 60
    while left := [command for _, command in marked(mark) if what in command]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


@pytest.mark.long
def test_nothing_is_left_of_a_driver_that_was_killed_and_a_rerun_completes(
    run: Any, driver: Any, tmp_path: Path
) -> None:
    driver().kill()
    gone(str(tmp_path))
    run("data", samples=16, workers=2)
    run("one", samples=16)
    assert rows(tmp_path / "data").equals(rows(tmp_path / "one"))


@pytest.mark.long
def test_ctrl_c_ends_all(driver: Any, tmp_path: Path) -> None:
    process = driver()
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.endswith("interrupted; run the same command again to go on\n")
    gone(str(tmp_path))


@pytest.mark.long
def test_workers_of_a_killed_driver_leave_a_cluster_that_stays(
    run: Any, driver: Any, cluster: tuple[str, str], tmp_path: Path
) -> None:
    address, mark = cluster
    process = driver("--ray", address)
    assert [command for _, command in marked(mark) if "ray::_Worker" in command]
    process.kill()
    gone(mark, "ray::_Worker")
    run("data", samples=16)
    run("one", samples=16)
    assert rows(tmp_path / "data").equals(rows(tmp_path / "one"))


def marked(mark: str) -> list[tuple[str, str]]:
    """Numbers and commands of living processes whose environment holds the mark."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                found.append((entry.name, (entry / "cmdline").read_text().replace("\0", " ")[:100]))
        except OSError:
            continue
    return found


@pytest.mark.vllm
@pytest.mark.long
def test_vllm_whose_process_is_killed_makes_room_for_another_worker(
    vllm_python: str, driver: Any, tmp_path: Path
) -> None:
    """In one process it ends in a sentence (`test_generate.py`)."""
    if subprocess.run([vllm_python, "-c", "import ray"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no ray beside vLLM")
    more = ["--engine", "vllm", "--max-new-tokens", "64", "--workers", "1"]
    for argument in ("enforce_eager=true", f"kv_cache_memory_bytes={2**28}", "max_num_seqs=16"):
        more += ["--engine-arg", argument]
    process = driver(*more, python=vllm_python, workers=())
    (engine,) = [int(pid) for pid, command in marked(str(tmp_path)) if "EngineCore" in command]
    os.kill(engine, signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "worker 1 is gone (" in said
    assert rows(tmp_path / "data").height == 24 * 16
    gone(str(tmp_path))
