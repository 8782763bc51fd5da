"""The sampling stage: exactly the rows that were asked for, whatever happens on the way; real vLLM at the end."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ple_data.common.watchdog import Watchdog
from ple_data.engines import Completion, Request, Sampling
from ple_data.inputs.principles import load_principle
from ple_data.sampling import generate as stage
from ple_data.sampling.generate import GenerateSummary, generate
from ple_data.sampling.plan import request_seed
from ple_data.storage.store import Store
from ple_data.storage.verify import verify
from ple_train.train import train
from schemas import tables
from schemas.errors import PleError, UsageError
from schemas.options import Gen, Train
from tests import tiny
from tests.conftest import ROOT
from tests.ple_train.test_train import write_pairs


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("queries") / "q.jsonl"
    rows = [{"id": f"q{at}", "x": x, "reference": f"r{at}"} for at, x in enumerate(tiny.corpus()[:20])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(policy: Path, queries: Path, tmp_path: Path) -> Any:
    """generate() with the hf engine on 20 queries in units of 4, into `tmp_path / data`."""

    def call(data: str = "data", **options: Any) -> GenerateSummary:
        settings = {
            "model": str(policy), "queries": str(queries), "principles": "imdb", "round": 0, "max_new_tokens": 6,
            "engine": "hf", "unit_size": 4,
        } | options  # fmt: skip
        return generate(Gen(data=tmp_path / data, **settings))

    return call


@pytest.fixture
def rows(tmp_path: Path) -> Any:
    """The committed rows, in order, after every check of the store."""

    def read(data: str = "data") -> pl.DataFrame:
        store = Store(tmp_path / data)
        assert [str(problem) for problem in verify(store) if problem.severity == "error"] == []
        return store.scan("responses").collect()

    return read


class FakeEngine:
    """Answers every request with its own seed's text; shuffles the order, and fails or waits where told to."""

    def __init__(self, fail_after: int | None = None, window: int = 3) -> None:
        self.fail_after, self.window = fail_after, window
        self.sampled: list[Any] = []
        self.closed = 0

    def sample(self, units: Iterator[Sequence[Request]], sampling: Sampling) -> Iterator[tuple[Request, Completion]]:
        draw = random.Random(0)
        waiting: list[Request] = []
        open_units = 0
        while True:
            while open_units < self.window and (unit := next(units, None)) is not None:
                waiting += unit
                open_units += 1
            if not waiting:
                return
            request = waiting.pop(draw.randrange(len(waiting)))
            open_units = len({r.key[0] for r in waiting})
            if len(self.sampled) == self.fail_after:
                raise PleError("the engine died")
            self.sampled.append(request.key)
            yield request, Completion([5, 1], f"text {request.seed}", "stop", [-1.0, -2.0])

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install a fake engine and return it."""

    def install(**options: Any) -> FakeEngine:
        engine = FakeEngine(**options)
        monkeypatch.setattr(stage, "make_engine", lambda *_: engine)
        return engine

    return install


def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the start of an engine fail."""

    def refuse(*_: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(stage, "make_engine", refuse)


# Rows


def test_rows_hold_everything(run: Any, rows: Any, policy: Path, tmp_path: Path) -> None:
    summary = run(samples=2, limit=10)
    table = rows()
    assert (summary.rows, summary.rows_sampled, table.height) == (20, 20, 20)
    assert table.select("query_id", "sample").unique().height == 20
    tokenizer = tiny.tiny_tokenizer()
    p = load_principle("imdb").text
    for row in table.to_dicts():
        at = int(row["query_id"][1:])
        assert (row["round"], row["seed"], row["principle"], row["reference"]) == (0, 0, p, f"r{at}")
        assert row["x"] == tiny.corpus()[at]
        assert row["x_ids"] == tokenizer(row["x"]).input_ids
        assert row["policy"].startswith("tiny@")
        for arm in ("y", "y_prompt"):
            assert len(row[f"{arm}_logps"]) == len(row[f"{arm}_ids"]) <= 6
            assert (row[f"{arm}_finish"] == "stop") == (row[f"{arm}_ids"][-1] == tokenizer.eos_token_id)
            assert row[f"{arm}_empty"] == (row[arm].strip() == "")
            assert row[arm] == tokenizer.decode(row[f"{arm}_ids"], skip_special_tokens=True)
    store = Store(tmp_path / "data")
    provenance = store.provenance(store.shards("responses")[0])
    assert provenance["sampling"] == {
        "max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0, "stop": [], "logprobs": True,
        "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
    }  # fmt: skip
    assert provenance["policy"] == table["policy"][0]
    assert (provenance["engine"], provenance["dtype"], provenance["device"]) == ("hf", "float32", "cpu")
    assert provenance["principle"] == {"name": "imdb", "digest": load_principle("imdb").digest}
    assert {"torch", "transformers"} <= provenance["packages"].keys()


def test_y_prompt_is_sampled_given_the_principle(run: Any, rows: Any, policy: Path) -> None:
    """y_prompt's log-probabilities are the model's given [p, x], and y's given x alone."""
    from tests.ple_data.engines.test_engines import AutoModelForCausalLM, assert_true_logps

    run(limit=4)
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    tokenizer = tiny.tiny_tokenizer()
    for row in rows().to_dicts():
        guided = tuple(tokenizer(f"{row['principle']}\n{row['x']}").input_ids)
        for arm, prompt in (("y", tuple(row["x_ids"])), ("y_prompt", guided)):
            assert_true_logps(model, Request(0, prompt, 0), row[f"{arm}_ids"], row[f"{arm}_logps"], atol=1e-4)


def test_without_a_principle_the_plain_arm_alone_is_sampled(run: Any, rows: Any, tmp_path: Path) -> None:
    run("both", limit=8)
    summary = run("plain", limit=8, principles=None)
    assert (summary.rows, summary.rows_sampled) == (8, 8)
    store = Store(tmp_path / "plain")
    assert [str(problem) for problem in verify(store) if problem.severity == "error"] == []
    answers = store.scan("answers").collect().sort("query_id")
    assert answers.columns == tables.ANSWERS.names
    same = rows("both").sort("query_id").select(answers.columns)
    assert answers.drop("y_logps").equals(same.drop("y_logps"))  # the very responses that a pair would have had
    assert run("plain", limit=8, principles=None).rows_done_before == 8


def test_the_empty_principle_gives_two_independent_plain_responses(run: Any, rows: Any) -> None:
    run("guided", limit=8)
    run("none", limit=8, principles="none")
    none, guided = rows("none"), rows("guided")
    assert none["y_ids"].to_list() == guided["y_ids"].to_list()
    assert none["y_prompt_ids"].to_list() != none["y_ids"].to_list()
    assert none["principle"].unique().to_list() == [""]


def test_without_logprobs_and_empty_responses(run: Any, rows: Any, fake: Any) -> None:
    engine = fake()
    engine.sample = lambda units, sampling: (
        (request, Completion([1], "", "stop", None)) for unit in units for request in unit
    )
    run(max_new_tokens=6, logprobs=False)
    table = rows()
    assert table["y_empty"].all()
    assert table["y_prompt_empty"].all()
    assert table["y_logps"].null_count() == table.height == 20


def test_seeds_come_from_what_a_request_is() -> None:
    """Frozen: another value would make an old, half-finished round different from its other half."""
    assert request_seed(0, 0, "q1", "y", 0) == 5135785071796368135
    names = list(itertools.product((0, 1), (0, 1), ("a", "b"), ("y", "y_prompt"), (0, 1)))
    seeds = {request_seed(*name) for name in names}  # type: ignore[arg-type]
    assert len(seeds) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


# Resuming and sharing


def test_resumed_is_bit_identical_to_uninterrupted(
    run: Any, rows: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run("whole")
    real = stage.make_engine

    class Dying:
        def __init__(self, *arguments: Any) -> None:
            self.engine = real(*arguments)

        def sample(self, units: Any, sampling: Any) -> Any:
            for at, found in enumerate(self.engine.sample(units, sampling)):
                if at == 20:  # two units of 4 queries and a half
                    raise PleError("killed")
                yield found

        def close(self) -> None:
            self.engine.close()

    with monkeypatch.context() as patch:
        patch.setattr(stage, "make_engine", Dying)
        with pytest.raises(PleError, match="killed"):
            run("parts")
    assert rows("parts").height == 8
    summary = run("parts")
    assert (summary.rows_done_before, summary.rows_sampled) == (8, 12)
    files = [sorted(p.relative_to(tmp_path / d) for p in (tmp_path / d).rglob("*.parquet")) for d in ("whole", "parts")]
    assert files[0] == files[1]
    for file in files[0]:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


def test_nothing_is_sampled_twice_and_claims_are_released(run: Any, rows: Any, fake: Any, tmp_path: Path) -> None:
    first = fake(fail_after=25)
    with pytest.raises(PleError, match="the engine died"):
        run()
    assert first.closed == 1
    committed = {row["query_id"] for row in rows().to_dicts()}
    assert 0 < len(committed) < 20
    store = Store(tmp_path / "data")
    manifest = store.load_manifest(0)
    assert manifest is not None
    assert manifest.counts["queries_taken"] == 20
    second = fake()
    summary = run()
    assert len(second.sampled) == 2 * summary.rows_sampled == 2 * (20 - len(committed))
    assert rows().height == 20


def test_a_finished_round_starts_no_engine(run: Any, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake()
    run()
    no_engine(monkeypatch)
    assert run().rows_done_before == 20


def test_the_engine_never_waits_for_a_unit_to_be_whole(run: Any, rows: Any, fake: Any) -> None:
    """With room for all units the engine gets all of them before the first is whole."""
    engine = fake(window=99)
    run()
    units = [key[0] for key in engine.sampled]
    first_whole = next(at for at in range(40) if units[: at + 1].count(units[at]) == 8)
    assert len(set(units[:first_whole])) == 5
    assert rows().height == 20


def test_other_settings_in_the_same_round_are_refused(run: Any, fake: Any, tmp_path: Path) -> None:
    fake()
    run()
    with pytest.raises(UsageError, match=r"round 0 of .* begun with other settings: seed: 1, there 0; .* --round"):
        run(seed=1)
    with pytest.raises(UsageError, match=r"limit: 4, there None.*temperature: 0\.5, there 1\.0"):
        run(max_new_tokens=6, temperature=0.5, limit=4)
    run(round=1, seed=1)
    assert Store(tmp_path / "data").scan("responses").collect().height == 40
    fake(fail_after=0)
    with pytest.raises(PleError, match="the engine died"):
        run(round=2)
    with pytest.raises(UsageError, match=r"nothing of it is committed yet, remove .*round=002\.json"):
        run(round=2, seed=1)


def test_a_round_that_was_begun_keeps_its_unit_size(run: Any, rows: Any, fake: Any) -> None:
    fake(fail_after=30)
    with pytest.raises(PleError, match="the engine died"):
        run()
    with pytest.raises(UsageError, match=r"unit_size: 5, there 4; a round that .* leave out --unit-size"):
        run(unit_size=5)
    fake()
    assert 0 < run(unit_size=None).rows_sampled < 20
    assert rows().height == 20


def test_waits_for_a_unit_that_another_process_holds(
    run: Any, rows: Any, fake: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real other process claims a unit; when it dies without committing, the unit is taken over."""
    monkeypatch.setattr("ple_data.storage.store.POLL_SECONDS", 0.05)
    fake()
    run("twin")
    unit = Store(tmp_path / "twin").shards("responses")[2].unit
    program = (
        "import sys; from ple_data.storage.store import Store\n"
        f"with Store({str(tmp_path / 'data')!r}).claim('responses', 0, {unit!r}) as ours:\n"
        "    print(ours, flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    summaries: list[GenerateSummary] = []
    worker = threading.Thread(target=lambda: summaries.append(run()))
    worker.start()
    try:
        deadline = time.monotonic() + 60
        output = ""
        while "locked by" not in output and time.monotonic() < deadline:
            time.sleep(0.05)
            output += capfd.readouterr().err
        assert f"locked by pid {holder.pid} on" in output
        assert worker.is_alive()
    finally:
        holder.kill()
        holder.communicate()
        worker.join(60)
    assert summaries[0].rows_sampled == 20
    assert rows().height == 20


def test_two_processes_share_a_round(policy: Path, tmp_path: Path, rows: Any) -> None:
    """By way of two paths, and where flock does nothing, as between two mounts of one file system."""
    no_locks = tmp_path / "no-locks"
    no_locks.mkdir()
    (no_locks / "sitecustomize.py").write_text(
        f"import fcntl, os\nfcntl.flock = lambda *_: None\nopen(f'{no_locks}/seen-{{os.getpid()}}', 'w').close()\n"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "mount").symlink_to("data")
    queries = tmp_path / "q.jsonl"
    queries.write_text("".join(json.dumps({"x": x}) + "\n" for x in tiny.corpus()))  # six units
    command = [
        sys.executable, "-m", "cli", "gen", "--model", str(policy), "--queries", str(queries), "--principles", "imdb",
        "--round", "0", "--engine", "hf", "--max-new-tokens", "20", "--data",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{no_locks}:{ROOT}"}
    pair = [
        subprocess.Popen([*command, tmp_path / way], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
        for way in ("data", "mount")
    ]
    logs = [process.communicate(timeout=300)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], logs
    table = rows()
    assert table.height == table["query_id"].n_unique() == len(tiny.corpus())
    sampled = [int(log.split(" pairs sampled")[0].split()[-1]) for log in logs]
    assert sum(sampled) == len(tiny.corpus()), logs
    assert len(list(no_locks.glob("seen-*"))) >= 2


# Reuse


def test_rows_of_an_earlier_run_are_reused(run: Any, rows: Any, fake: Any, tmp_path: Path, monkeypatch: Any) -> None:
    fake()
    run("old", limit=12)
    engine = fake()
    summary = run("new", reuse=[tmp_path / "old"], seed=7, round=3)
    assert (summary.rows_reused, summary.rows_sampled) == (12, 8)
    assert len(engine.sampled) == 16
    old, new = rows("old"), rows("new")
    reused = new.filter(pl.col("seed") == 0)
    assert reused["round"].unique().to_list() == [3]
    assert reused.drop("round").equals(old.drop("round"))
    assert new.filter(pl.col("seed") == 7).height == 8
    no_engine(monkeypatch)
    assert run("third", reuse=[tmp_path / "old", tmp_path / "new"], seed=8).rows_reused == 20


def test_a_reused_row_has_the_reference_of_the_query_at_hand(
    run: Any, rows: Any, fake: Any, queries: Path, tmp_path: Path
) -> None:
    fake()
    run("old", limit=4)
    other = tmp_path / "other.jsonl"
    other.write_text(queries.read_text().replace('"reference": "r', '"reference": "new r'))
    assert run("new", limit=4, queries=str(other), reuse=[tmp_path / "old"]).rows_reused == 4
    assert sorted(rows("new")["reference"]) == ["new r0", "new r1", "new r2", "new r3"]


@pytest.mark.parametrize(
    "other",
    [
        {"principles": "hh"},
        {"max_new_tokens": 6, "temperature": 0.5},
        {"max_new_tokens": 7},
        {"max_new_tokens": 6, "stop": ("a",)},
        {"prompt_format": "chat"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_rows_of_another_kind_are_not_reused(
    run: Any, fake: Any, tmp_path: Path, other: dict[str, Any], chat_policy: Path
) -> None:
    fake()
    base = {"model": str(chat_policy), "prompt_format": "plain"}
    run("old", **base)
    assert run("new", reuse=[tmp_path / "old"], **{**base, **other}).rows_reused == 0


def test_rows_of_a_policy_whose_folder_was_renamed_are_reused(
    run: Any, rows: Any, fake: Any, tmp_path: Path, policy: Path
) -> None:
    fake()
    run("old")
    renamed = shutil.copytree(policy, tmp_path / "renamed")
    assert run("new", model=str(renamed), reuse=[tmp_path / "old"]).rows_reused == 20
    (name,) = rows("new")["policy"].unique()
    assert name.startswith("renamed@")


def test_reuse_of_another_policy_or_of_nothing(
    run: Any, fake: Any, tmp_path: Path, adapter: Path, policy: Path
) -> None:
    fake()
    run("old", max_new_tokens=6, logprobs=False)
    assert run("a", reuse=[tmp_path / "old"], adapter=str(adapter)).rows_reused == 0
    assert run("b", reuse=[tmp_path / "old"]).rows_reused == 0  # it has no log-probabilities
    assert run("c", reuse=[tmp_path / "b"], max_new_tokens=6, logprobs=False).rows_reused == 20
    with pytest.raises(UsageError, match="has no committed responses"):
        run("d", reuse=[tmp_path / "none"])
    with pytest.raises(UsageError, match="is --data itself"):
        run("old", reuse=[tmp_path / "old"])


# What is refused before an engine starts


def test_dry_run_shows_both_prompts_and_writes_nothing(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_engine(monkeypatch)
    shown = run(dry_run=True).dry_run
    assert shown is not None
    x = tiny.corpus()[0]
    assert f"\n{x}\nids: {tiny.tiny_tokenizer()(x).input_ids}" in shown
    assert f"{load_principle('imdb').text}\n{x}\nids: " in shown
    assert not (tmp_path / "data").exists()


def test_dry_run_shows_the_prompts_where_the_responses_would_be_too_long(run: Any, capsys: Any) -> None:
    assert "guided prompt" in run(dry_run=True, max_new_tokens=2040).dry_run
    assert "this will be refused: the longest prompt has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 2, "temperature": 0.0}, "would sample the same response 2 times"),
        ({"max_query_tokens": 1}, "no query of .* is left; raise --max-query-tokens"),
        ({"max_new_tokens": 2040}, "over the 2048 positions of .*; lower --max-new-tokens"),
        ({"samples": 0}, "--samples must be at least 1"),
        ({"limit": 0}, "--limit must be at least 1"),
        ({"seed": 2**63}, "--seed must be below 9223372036854775808"),
        ({"engine_arg": ["batchsize=1"]}, "did you mean batch_size"),
        ({"model": "/none"}, "does not exist"),
        ({"adapter": "/none"}, "no adapter directory"),
        ({"principles": "nobody"}, "neither built in"),
        ({"prompt_format": "chat"}, "chat template"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    no_engine(monkeypatch)
    with pytest.raises(UsageError, match=message):
        run(**options)
    assert not (tmp_path / "data").exists()


# Real vLLM in its own environment


class Vllm:
    """ple-gen on vLLM as a child process; it and all its descendants carry a mark in their environment."""

    def __init__(self, python: str, arguments: list[str], log: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.log = log
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "PLE_TEST_MARK": self.mark,
            "SPT_NOENV": "1",
        }  # fmt: skip
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [python, "-m", "cli", "gen", *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=file
            )

    def alive(self) -> dict[int, str]:
        """Every living process of this run, with its command line."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if self.mark.encode() in (entry / "environ").read_bytes():
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue
        return found

    def engine(self) -> int:
        """The process id of the engine's own process."""
        (pid,) = [pid for pid, command in self.alive().items() if "EngineCore" in command]
        return pid

    def wait_until(self, ready: Any, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def assert_gone(self, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while (left := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == {}
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.mark.vllm
@pytest.mark.long
@pytest.mark.timeout(900)
def test_vllm_interrupted_in_every_way_leaves_no_process_and_loses_nothing(
    vllm_python: str, policy: Path, tmp_path: Path, rows: Any
) -> None:
    """kill -9, Ctrl-C and the engine's own process killed (vLLM itself would wait for it for ever), each in the middle,
    then the same command to its end; with an adapter of ple-train.
    """
    adapter, pairs = tmp_path / "adapter", write_pairs(tmp_path / "pairs", rounds=1)
    train(Train(model=str(policy), data=[pairs], round=0, output=adapter, learning_rate=1e-2))
    queries = tmp_path / "q.jsonl"
    texts = [f"{a} {b}" for a in tiny.corpus()[:10] for b in tiny.corpus()[:10]]
    queries.write_text("".join(json.dumps({"id": f"q{at}", "x": x}) + "\n" for at, x in enumerate(texts)))
    arguments = [
        "--model", str(policy), "--adapter", str(adapter), "--queries", str(queries), "--principles", "imdb", "--data",
        str(tmp_path / "data"), "--round", "0", "--engine", "vllm", "--max-new-tokens", "128", "--dtype", "float32",
        "--unit-size", "8", "--engine-arg", "max_num_seqs=16",
    ]  # fmt: skip
    eager = [*arguments, "--engine-arg", "enforce_eager=true"]  # starts sooner; the last one is as a user runs it
    store = Store(tmp_path / "data")

    def committed() -> list[str]:
        return [shard.unit for shard in store.shards("responses")]

    for code in (-signal.SIGKILL, 130, 1):
        before = committed()
        middle = Vllm(vllm_python, eager, tmp_path / f"log{code}")
        middle.wait_until(lambda seen=before: len(committed()) > len(seen))
        if code == 1:
            os.kill(middle.engine(), signal.SIGKILL)
        else:
            middle.process.send_signal(signal.SIGINT if code == 130 else signal.SIGKILL)
        assert middle.process.wait(timeout=60) == code
        middle.assert_gone()
        died = middle.log.read_text().splitlines()[-1].startswith("error: the vLLM engine died (its own messages are")
        assert died == (code == 1)
        assert set(before) < set(committed())
    assert len(committed()) * 8 < len(texts), "all was done before it could be interrupted: give it more to do"
    last = Vllm(vllm_python, arguments, tmp_path / "log")
    stdout, _ = last.process.communicate(timeout=300)
    assert last.process.returncode == 0, last.log.read_text()
    assert stdout == b""
    last.assert_gone()
    table = rows()
    assert table.height == table["query_id"].n_unique() == len(texts)
    from peft import PeftModel

    from tests.ple_data.engines.test_engines import AutoModelForCausalLM, assert_true_logps

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy), str(adapter)).eval()
    for row in table.gather_every(10).to_dicts():
        assert_true_logps(model, Request(0, tuple(row["x_ids"]), 0), row["y_ids"], row["y_logps"], atol=5e-3)


@pytest.mark.vllm
@pytest.mark.long
def test_vllm_that_cannot_start_is_one_clear_line(
    vllm_python: str, policy: Path, queries: Path, tmp_path: Path
) -> None:
    """There is no room for a cache, which a process of the engine finds out."""
    arguments = [
        "--model", str(policy), "--queries", str(queries), "--principles", "hh", "--data", str(tmp_path / "data"),
        "--round", "0", "--engine", "vllm", "--max-new-tokens", "8", "--engine-arg", "enforce_eager=true",
        "--engine-arg", "num_gpu_blocks_override=0",
    ]  # fmt: skip
    failing = Vllm(vllm_python, arguments, tmp_path / "log")
    assert failing.process.wait(timeout=300) == 1
    assert "error: vLLM did not start: " in failing.log.read_text().splitlines()[-1]
    failing.assert_gone()


def test_watchdog_ends_what_its_owner_leaves(tmp_path: Path) -> None:
    """The owner is killed with -9; its child, which ignores signals and renamed nothing, must go."""
    program = (
        "import subprocess, sys, time\n"
        "from ple_data.common.watchdog import Watchdog\n"
        "Watchdog()\n"
        "code = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'\n"
        "child = subprocess.Popen([sys.executable, '-c', code], start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    owner.stdout.close()
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 10
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(child)


def test_watchdog_stops_with_its_owner_in_peace() -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    watchdog = Watchdog()
    carrier = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    watchdog.stop()
    watchdog.stop()
    assert carrier.wait(timeout=10) == -signal.SIGKILL
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_other_queries_are_named_and_the_way_to_add_some_is_said(
    run: Any, fake: Any, queries: Path, tmp_path: Path
) -> None:
    fake()
    run()
    more = tmp_path / "more.jsonl"
    more.write_text(queries.read_text() + json.dumps({"id": "new", "x": "One more."}) + "\n")
    message = rf"queries: 21 of {more}, there 20 of {queries}; with more queries, give another --data and --reuse"
    with pytest.raises(UsageError, match=message):
        run(queries=str(more))


def test_a_round_that_is_planned_while_it_is_sampled_is_the_same(
    run: Any, rows: Any, tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    fake(window=2)
    run(unit_size=2, shuffle=True)
    counts = Store(tmp_path / "data").load_manifest(0).counts
    for room in ("plan", "generate"):
        monkeypatch.setattr(f"ple_data.sampling.{room}.AHEAD", 3)
    monkeypatch.setattr("ple_data.sampling.plan.RENDERED_AT_ONCE", 2)
    fake(fail_after=18, window=2)
    with pytest.raises(PleError, match="died"):
        run("other", unit_size=2, shuffle=True)
    assert "so far, the others as they come" in capsys.readouterr().err
    assert Store(tmp_path / "other").load_manifest(0).rows is None
    fake(window=2)
    summary = run("other", unit_size=2, shuffle=True)
    assert summary.rows_done_before > 0
    assert summary.rows == 20 == summary.rows_done_before + summary.rows_sampled
    assert rows("other").equals(rows())
    assert Store(tmp_path / "other").load_manifest(0).counts == counts == summary.counts
