"""Workers on a real cluster of Ray: the rows of one process, whoever dies; and one sentence for what cannot work."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ple_data.common.workers import Wanted
from ple_data.sampling.generate import generate
from ple_data.scoring.score import score
from ple_data.scoring.workers import WorkersReward
from ple_data.storage.store import Store
from ple_data.storage.verify import verify
from schemas.errors import PleError, UsageError
from schemas.options import Gen, Rewards
from tests import tiny
from tests.conftest import ROOT

pytest.importorskip("ray")


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


def rows(data: Path, kind: str = "responses") -> pl.DataFrame:
    store = Store(data)
    assert [str(problem) for problem in verify(store) if problem.severity == "error"] == []
    return store.scan(kind).collect().sort("query_id", "sample")


def test_gen_and_score_by_two_workers_give_the_rows_of_one_process(
    run: Any, adapter: Path, reward: Path, tmp_path: Path
) -> None:
    run("one", adapter=str(adapter))
    summary = run("two", adapter=str(adapter), workers=2)
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
    assert found.drop("s", "s_prompt").equals(expected.drop("s", "s_prompt"))
    assert found["s"].to_list() == pytest.approx(expected["s"].to_list(), rel=1e-5)


DEADLY = """
import os, pathlib
def reward(xs, ys):
    here = pathlib.Path(__file__).parent
    if {query!r} in xs:
        with (here / "deaths").open("a") as deaths:
            deaths.write("x")
        if {always} or (here / "deaths").stat().st_size < 2:
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
            with pytest.raises(PleError, match=r"unit 00003-\w+ of round 0: 3 workers died over it"):
                score(store, workers)
            assert len(store.shards("pairs")) == 5
            assert (tmp_path / "deaths").read_text() == "xxx"
        else:
            score(store, workers)
            assert rows(tmp_path / "data", "pairs").height == 24
    finally:
        workers.close()
    assert "its work goes to others" in capsys.readouterr().out


def test_what_cannot_work_is_one_sentence(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"--ray 127.0.0.1:1: no cluster of Ray there \(.*refused"):
        run("a", workers=1, ray="127.0.0.1:1")
    (tmp_path / "bad.py").write_text("1 / 0")
    with pytest.raises(PleError, match=r"bad\.py.*ZeroDivisionError.*\(on "):
        WorkersReward(f"{tmp_path / 'bad.py'}:reward", Rewards(), Wanted(1), print)


def test_nothing_is_left_of_a_driver_that_was_killed_and_a_rerun_completes(
    run: Any, policy: Path, tmp_path: Path
) -> None:
    words = ["-m", "cli", "gen", "--model", str(policy), "--queries", str(tmp_path / "q.jsonl"), "--principles", "imdb"]
    words += ["--round", "0", "--max-new-tokens", "8", "--unit-size", "4", "--engine", "hf", "--workers", "2"]
    words += ["--dtype", "float32", "--data", str(tmp_path / "data"), "--samples", "16"]
    mark = {"PLE_TEST_MARK": str(tmp_path)}
    driver = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env={**os.environ, **mark}, stderr=subprocess.PIPE, text=True
    )
    store = Store(tmp_path / "data")
    while driver.poll() is None and not store.shards("responses"):
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    _, said = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, said
    deadline = time.monotonic() + 60
    while left := marked(str(tmp_path)):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    run("data", samples=16, workers=2)
    run("one", samples=16)
    assert rows(tmp_path / "data").equals(rows(tmp_path / "one"))


def marked(mark: str) -> list[str]:
    """Commands of living processes whose environment holds the mark."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_text().replace("\0", " ")[:100])
        except OSError:
            continue
    return found
