"""The scoring stage: pairs of the same unit, resumed, shared, re-scored elsewhere, and refused where not finite."""

import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ple_data.common.digests import text_digest
from ple_data.rewards import RewardModel, load_reward_model
from ple_data.scoring.score import ScoreCounts, score
from ple_data.storage.store import Store, Waits
from ple_data.storage.verify import verify
from schemas.errors import DamagedError, PleError, UsageError
from schemas.records import RoundManifest
from schemas.tables import RESPONSES
from tests.conftest import ROOT


class Words(RewardModel):
    """A reward model for tests: the words of y, and a record of what it was asked."""

    truncated = 0
    runs_on = False

    def __init__(self, name: str = "words@1", reward: Callable[[str, str], float] | None = None) -> None:
        self.name = name
        self.asked: list[tuple[str, str]] = []
        self._reward = reward or (lambda x, y: float(len(y.split())))

    def stream(self, rows: Sequence[tuple[str, str]]) -> Iterator[list[tuple[int, float]]]:
        self.asked += rows
        yield [(row, self._reward(x, y)) for row, (x, y) in enumerate(rows)]


def commit_unit(store: Store, unit: int, *, round: int = 0, rows: int = 4, provenance: Mapping[str, str] = {}) -> str:
    """One unit of responses: y has 1 + its query's number words, y_prompt one word more."""
    queries = [unit * rows + row for row in range(rows)]
    columns = {
        "query_id": [f"q{n}" for n in queries],
        "round": [round] * rows,
        "sample": [0] * rows,
        "x": [f"query {n}" for n in queries],
        "y": ["word " * (n + 1) for n in queries],
        "y_prompt": ["word " * (n + 2) for n in queries],
        "x_ids": [[1, 2]] * rows,
        "y_ids": [[3]] * rows,
        "y_prompt_ids": [[3, 4]] * rows,
        "y_finish": ["stop"] * rows,
        "y_prompt_finish": ["length"] * rows,
        "y_empty": [False] * rows,
        "y_prompt_empty": [False] * rows,
        "principle": ["Be kind."] * rows,
        "policy": ["tiny@1"] * rows,
        "seed": [7] * rows,
        "y_logps": [[-1.0]] * rows,
        "y_prompt_logps": [[-1.0, -2.0]] * rows,
    }
    name = f"{unit:05d}-abcdef012345"
    table = pa.table(columns)
    store.save_manifest(RoundManifest(round=round, settings={}))
    with store.claim("responses", round, name) as ours:
        assert ours
        store.commit("responses", round, name, table, {"policy": "tiny@1", "sampling": {"top_p": 1.0}, **provenance})
    return name


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three units of four rows in round 0, one in round 1."""
    store = Store(tmp_path / "data")
    for unit in range(3):
        commit_unit(store, unit)
    commit_unit(store, 3, round=1)
    return store


def contents(store: Store) -> dict[str, bytes]:
    """The bytes of every pairs file."""
    files = sorted((store.root / "pairs").rglob("*.parquet"))
    return {str(file.relative_to(store.root)): file.read_bytes() for file in files}


def test_pairs_are_the_responses_with_their_rewards(store: Store):
    counts = score(store, Words())
    assert counts == ScoreCounts(units=4, rows=16)
    responses, pairs = store.shards("responses"), store.shards("pairs")
    assert [(s.round, s.unit, s.rows) for s in pairs] == [(s.round, s.unit, s.rows) for s in responses]
    for shard, source in zip(pairs, responses, strict=True):
        table = store.read(shard)
        assert table.select(RESPONSES.names).equals(store.read(source))
        words = [len(y.split()) for y in table["y"].to_pylist()]
        assert table["s"].to_pylist() == words
        assert table["s_prompt"].to_pylist() == [count + 1 for count in words]
        assert set(table["reward_model"].to_pylist()) == {"words@1"}
    assert list(verify(store)) == []


def test_the_file_says_which_reward_model_and_keeps_where_the_responses_came_from(store: Store):
    score(store, Words())
    provenance = store.provenance(store.shards("pairs")[0])
    assert provenance["reward_model"] == "words@1"
    assert provenance["policy"] == "tiny@1"
    assert provenance["sampling"] == {"top_p": 1.0}
    assert provenance["kind"] == "pairs"


def test_one_round_only(store: Store):
    assert score(store, Words(), round=1).rows == 4
    assert {shard.round for shard in store.shards("pairs")} == {1}
    with pytest.raises(UsageError, match=r"no responses in round 2 of .*run ple-gen"):
        score(store, Words(), round=2)


def test_a_store_without_responses_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="no responses in"):
        score(Store(tmp_path / "none"), Words())
    assert not (tmp_path / "none").exists()


def test_the_same_text_is_scored_once(tmp_path: Path):
    store = Store(tmp_path)
    commit_unit(store, 0)
    table = store.read(store.shards("responses")[0])
    same = table.set_column(table.schema.get_field_index("y_prompt"), RESPONSES.field("y_prompt"), table["y"])
    with store.claim("responses", 1, "00000-same") as ours:
        assert ours
        rounds = pa.array([1] * len(same), pa.int32())
        same = same.set_column(same.schema.get_field_index("round"), RESPONSES.field("round"), rounds)
        store.commit("responses", 1, "00000-same", same, {})
    reward_model = Words()
    score(store, reward_model, round=1)
    assert len(reward_model.asked) == len(set(reward_model.asked)) == 4


def test_what_is_done_is_known_from_one_listing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at each unit's record and file by themselves takes minutes where there are 100,000."""
    score(store, Words())
    monkeypatch.setattr(Store, "is_committed", lambda *_: pytest.fail("a unit was looked at"))
    assert score(store, Words()).rows_done_before == 16


def test_what_is_committed_is_not_scored_again(store: Store):
    class Stops(Words):
        def score(self, rows):
            if len(self.asked) >= 16:
                raise PleError("the server is gone")
            return super().score(rows)

    stops = Stops()
    with pytest.raises(PleError, match="the server is gone"):
        score(store, stops)
    done = set(stops.asked)
    again = Words()
    counts = score(store, again)
    assert (counts.rows_done_before, counts.rows) == (8, 8)
    assert not done & set(again.asked)
    resumed = contents(store)

    whole = Store(store.root.parent / "whole")
    score(store, Words(), output=whole)
    assert resumed == contents(whole)
    assert score(store, Words()) == ScoreCounts(rows_done_before=16)


def test_another_model_scores_into_another_store(store: Store, tmp_path: Path):
    score(store, Words())
    before = contents(store)
    other = Store(tmp_path / "other")
    negative = Words("negative@1", lambda x, y: -float(len(y)))
    score(store, negative, output=other)
    assert contents(store) == before
    assert len(other.shards("pairs")) == 4
    assert other.shards("responses") == []
    assert max(other.read(other.shards("pairs")[0])["s"].to_pylist()) < 0
    assert [problem for problem in verify(other) if problem.severity == "error"] == []


@pytest.mark.parametrize("with_record", [True, False])
def test_two_models_are_never_mixed_in_one_store(store: Store, with_record: bool):
    score(store, Words(), round=0)
    if not with_record:
        (store.root / ".ple" / "reward_model").unlink()
    with pytest.raises(UsageError, match=r"scored by words@1, not by words@2.*--output"):
        score(store, Words("words@2"))
    assert len(store.shards("pairs")) == 3


def test_a_store_keeps_an_address_as_an_older_version_recorded_it(store: Store):
    old, now = "https://h/sk-0a1b2c3d4e/r", f"https://h/[{text_digest('sk-0a1b2c3d4e')}]/r"
    score(store, Words(name=old), round=0)
    score(store, Words(name=now), round=1)
    assert set(store.scan("pairs").collect()["reward_model"]) == {old}
    with pytest.raises(UsageError, match="scored by"):
        score(store, Words(name="https://h/[0123456789ab]/r"))


def test_of_two_models_that_start_at_once_one_is_refused(store: Store):
    """The second has passed the check at the start and commits first."""

    class Overtaken(Words):
        def score(self, rows):
            if not self.asked:
                score(store, Words("first@1"), round=1)
            return super().score(rows)

    with pytest.raises(UsageError, match=r"scored by first@1, not by overtaken@1"):
        score(store, Overtaken("overtaken@1"))
    assert {shard.round for shard in store.shards("pairs")} == {1}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39])
def test_rewards_that_are_not_finite_are_refused_with_their_rows(store: Store, bad: float):
    """1e39 is finite as float64 and infinite as float32, which is what the table holds."""
    reward_model = Words(reward=lambda x, y: bad if len(y.split()) == 7 else 1.0)
    with pytest.raises(PleError) as caught:
        score(store, reward_model)
    message = str(caught.value)
    assert "part-00001-abcdef012345.parquet" in message
    assert "query 'q6' sample 0 s = " in message
    assert "query 'q5' sample 0 s_prompt = " in message
    assert "q4" not in message
    assert [shard.unit for shard in store.shards("pairs")] == ["00000-abcdef012345"]
    assert score(store, Words()).rows_done_before == 4


def test_a_damaged_shard_is_named_and_the_rest_is_kept(store: Store):
    second = store.shards("responses")[1]
    second.path.write_bytes(second.path.read_bytes()[:-20])
    with pytest.raises(DamagedError, match=r"part-00001-abcdef012345\.parquet"):
        score(store, Words())
    assert len(store.shards("pairs")) == 1


def test_texts_that_were_cut_are_counted_and_reported(store: Store, capsys: pytest.CaptureFixture[str]):
    class Cuts(Words):
        def score(self, rows):
            self.truncated += 2
            return super().score(rows)

    assert score(store, Cuts()).texts_cut == 8
    out, err = capsys.readouterr()
    assert out == ""
    assert "8 texts are longer than the reward model takes" in err


def test_a_unit_that_is_held_is_waited_for(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    shard = store.shards("responses")[0]
    with ExitStack() as holder:
        holder.enter_context(store.claim("pairs", shard.round, shard.unit))
        waited = Waits.a_moment
        monkeypatch.setattr("ple_data.storage.store.POLL_SECONDS", 0)
        monkeypatch.setattr(Waits, "a_moment", lambda waits, units: waited(waits, units) or holder.close())
        assert score(store, Words()).rows == 16
    assert capsys.readouterr().err.count(f"locked by pid {os.getpid()} on") == 1


def test_a_classifier_of_transformers_end_to_end(store: Store, reward: Path):
    reward_model = load_reward_model(str(reward))
    score(store, reward_model)
    table = store.read(store.shards("pairs")[0])
    rows = list(zip(table["x"].to_pylist(), table["y_prompt"].to_pylist(), strict=True))
    assert table["s_prompt"].to_pylist() == pytest.approx(load_reward_model(str(reward)).score(rows), abs=1e-4)
    assert len(set(table["s_prompt"].to_pylist())) > 1
    assert table["reward_model"][0].as_py().startswith(f"{reward.name}@")


# --- several real processes --------------------------------------------------------------------------------

SLOW_REWARD = """
import time
def words(xs, ys):
    time.sleep({seconds})
    return [float(len(y.split())) for y in ys]
"""


def start_scoring(store: Store, function: Path) -> subprocess.Popen:
    program = (
        "import sys; from ple_data.scoring.score import score; from ple_data.storage.store import Store; "
        "from ple_data.rewards import load_reward_model; "
        "counts = score(Store(sys.argv[1]), load_reward_model(sys.argv[2])); print(counts.rows)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(store.root), f"{function}:words"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


MEETING_REWARD = """
import os, pathlib, time
here = pathlib.Path(__file__).parent
def words(xs, ys):
    (here / f"at-work-{os.getpid()}").touch()
    deadline = time.monotonic() + 100
    while len(list(here.glob("at-work-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    return [float(len(y.split())) for y in ys]
"""
"""No unit is done before three processes are at work on one each."""


def test_three_processes_share_the_work(store: Store, tmp_path: Path):
    function = tmp_path / "meeting.py"
    function.write_text(MEETING_REWARD)
    processes = [start_scoring(store, function) for _ in range(3)]
    rows = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        rows.append(int(out))
    assert sorted(rows) == [4, 4, 8]
    assert list(verify(store)) == []


def test_a_unit_of_a_killed_process_is_taken_over(store: Store, tmp_path: Path):
    function = tmp_path / "slow.py"
    function.write_text(SLOW_REWARD.format(seconds=60))
    process = start_scoring(store, function)
    shard = store.shards("responses")[0]
    deadline = time.monotonic() + 60
    while store.holder("pairs", shard.round, shard.unit) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    threading.Timer(0.5, process.kill).start()
    function.write_text(SLOW_REWARD.format(seconds=0))
    assert score(store, load_reward_model(f"{function}:words")).rows == 16
    process.communicate(timeout=20)
    assert process.returncode < 0
    assert list(verify(store)) == []
    assert pq.read_table(store.shards("pairs")[0].path)["s"].type == pa.float32()
    assert np.isfinite(store.scan("pairs").collect()["s"].to_numpy()).all()


def test_a_round_is_finished_when_every_unit_of_its_responses_is_scored(store: Store):
    """Also one whose last unit came while the others were scored."""
    store.finish("responses", 1)

    class Slow(Words):
        def score(self, rows: Sequence[tuple[str, str]]) -> list[float]:
            if not store.finished_units("responses", 0):
                commit_unit(store, 9)
                store.finish("responses", 0)
            return super().score(rows)

    score(store, Slow())
    assert [store.finished_units("pairs", t) > 0 for t in (0, 1)] == [False, True]
    score(store, Words())
    assert store.finished_units("pairs", 0)


def test_a_round_that_is_still_sampled_is_said(store: Store, capfd: pytest.CaptureFixture[str]):
    store.manifest_path(0).unlink()
    store.save_manifest(RoundManifest(round=0, settings={"samples": 1}, counts={"queries_taken": 400}))
    score(store, Words())
    assert "warning: round 0 has 12 of its 400 pairs so far: run ple-gen to its end" in capfd.readouterr().err


def test_pairs_that_were_cut_short_do_not_count_as_done(store: Store):
    score(store, Words())
    path = store.shards("pairs")[0].path
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DamagedError, match=rf"{path.name}: 100 bytes instead of"):
        score(store, Words())
    (problem,) = (p for p in verify(store) if p.severity == "error")
    assert "100 bytes, but" in str(problem)
    assert str(problem).count("restore it from a copy") == 1


def test_what_was_asked_as_a_chat_is_one_to_a_model_that_reads_one_text(tmp_path: Path):
    for prompts, x in (({"prompts": "chat"}, '[{"role": "user", "content": "query 0"}]'), ({}, "query 0")):
        store, model = Store(tmp_path / str(len(prompts))), Words()
        commit_unit(store, 0, provenance=prompts)
        model.runs_on = True
        score(store, model)
        assert model.asked[0] == (x, "word ")
        score(store, other := Words("other@1"), output=Store(tmp_path / f"other{len(prompts)}"))
        assert other.asked[0] == ("query 0", "word ")
