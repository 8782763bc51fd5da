"""A run that starts its own model server: one for all rounds, asleep while they train, gone with the run."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ple_train.run import rounds, serve
from ple_train.run.child import Ended
from ple_train.run.serve import Server
from schemas.errors import PleError, UsageError
from schemas.recipe import parse_recipe
from tests.conftest import ROOT
from tests.ple_train.run.test_rounds import Bench, eventually, is_running, pairs_of

STAND_IN = """\
import http.server, os, pathlib, sys
here = pathlib.Path(__file__).parent
if (here / "broken").exists():
    sys.exit("no room for the model")
(here / "server").write_text(str(os.getpid()))

class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        with (here / "calls.jsonl").open("a") as calls:
            calls.write('["%s"]\\n' % self.path.split("?")[0].strip("/"))
        self.send_response(200)
        self.end_headers()
    do_POST = do_GET
    log_message = lambda *_: None

http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answers).serve_forever()
"""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    found = Bench(tmp_path)
    script = tmp_path / "server.py"
    script.write_text(STAND_IN)
    found.values["gen"]["server"] = {"command": [sys.executable, str(script), "serve", "{model}"], "sleep": True}
    return found


def test_one_server_for_all_rounds_that_sleeps_while_they_are_scored_and_train(bench: Bench) -> None:
    rounds.run(bench.recipe)
    names = [name for name, *_ in bench.calls() if name != "health"]
    assert names == ["gen", "sleep", "score", "train", "wake_up", "gen", "sleep", "score", "train"]
    asked = [call for call in bench.calls() if call[0] == "gen"]
    assert [call[-2] for call in asked] == ["--endpoint"] * 2
    assert asked[0][-1] == asked[1][-1]
    assert not is_running(int((bench.folder / "server").read_text()))
    assert "--endpoint" not in str(bench.records())
    rounds.run(bench.recipe)  # there is nothing to do, and no server for it
    assert [name for name, *_ in bench.calls() if name != "health"] == names


def test_no_proxy_stands_before_the_server(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that is dead it is not even asked."""
    for name in ("http_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.setenv(name, "" if name == "no_proxy" else "http://127.0.0.1:9")
    monkeypatch.setattr(serve, "START_SECONDS", 30.0)
    server = Server(bench.recipe.gen.server, "m", bench.folder / "server.log")
    with server:
        server.address()
        server.rest()
    assert [name for name, *_ in bench.calls()] == ["health", "sleep"]


def test_a_server_that_ends_while_a_round_is_sampled_is_started_again_at_its_address(bench: Bench) -> None:
    server = Server(bench.recipe.gen.server, "m", bench.folder / "server.log")
    pid = bench.folder / "server"
    with server:
        with server.watched() as address:
            first = int(pid.read_text())
            os.kill(first, signal.SIGKILL)
            eventually(lambda: pid.read_text() not in ("", str(first)), "no other one was started")
        assert server.address() == address  # it is waited for
        server.rest()
    names = [name for name, *_ in bench.calls() if name != "health"]
    assert names == ["sleep"]


def test_a_server_that_does_not_come_up_again_is_not_started_for_ever(
    bench: Bench, capfd: pytest.CaptureFixture
) -> None:
    server = Server(bench.recipe.gen.server, "m", bench.folder / "server.log")
    said = ""

    def is_said() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "ended before it was ready" in said

    with server, server.watched():
        (bench.folder / "broken").touch()
        os.kill(int((bench.folder / "server").read_text()), signal.SIGKILL)
        eventually(is_said, "nothing was said")
    assert said.count("starting the server") == 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_server_ends_with_the_run_however_that_ends(bench: Bench, number: signal.Signals) -> None:
    process, _ = bench.start_and_hang("gen")
    server = int((bench.folder / "server").read_text())
    assert is_running(server)
    process.send_signal(number)
    process.communicate(timeout=60)
    eventually(lambda: not is_running(server), "the server outlived the run")


def test_a_server_that_does_not_start_is_said_with_its_last_words(bench: Bench) -> None:
    (bench.folder / "broken").touch()
    with pytest.raises(PleError, match=r"ended before it was ready; .*server\.log says why: no room for the model"):
        rounds.run(bench.recipe)


def test_a_server_that_cannot_sleep_is_said(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    script = bench.folder / "server.py"
    script.write_text(script.read_text().replace("do_POST = do_GET", ""))
    with pytest.raises(UsageError, match=r"does not sleep .*--enable-sleep-mode, or leave out gen\.server\.sleep"):
        rounds.run(bench.recipe)


@pytest.mark.parametrize(
    ("gen", "more", "message"),
    [
        ({"endpoint": ["http://h:1"]}, {}, "give either server"),
        ({"engine": "vllm"}, {}, "give either server"),
        ({}, {"train": {"full": True}}, "gen.server serves one model .*: leave it out, or train.full"),
        ({}, {"baseline": {"method": "raft", "full": True}}, "gen.server serves one model .*, or baseline.full"),
        ({"server": {"command": []}}, {}, "gen.server.command"),
    ],
)
def test_what_does_not_go_together_is_found_first(bench: Bench, gen: dict, more: dict, message: str) -> None:
    bench.values["gen"] |= gen
    with pytest.raises(UsageError, match=message):
        parse_recipe(bench.values | more, "test")


def test_the_training_that_a_baseline_takes_the_place_of_does_not_count(bench: Bench) -> None:
    bench.values |= {"train": {"full": True}, "baseline": {"method": "raft"}}
    assert bench.recipe.gen.server


@pytest.mark.vllm
@pytest.mark.long
def test_rounds_on_a_real_server(
    policy: Path, reward: Path, vllm_python: str, tmp_path: Path, run_forked: Callable[..., Ended], monkeypatch
) -> None:
    monkeypatch.setattr(rounds, "run_child", run_forked)
    monkeypatch.setattr(serve, "START_SECONDS", 400.0)
    for name, value in {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    queries = tmp_path / "queries.jsonl"
    queries.write_text("".join(json.dumps({"x": f"the story of scene {n} was"}) + "\n" for n in range(6)))
    words = [vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}", "--enable-lora"]
    values = {
        "model": str(policy),
        "queries": str(queries),
        "principles": "imdb",
        "reward_model": str(reward),
        "run_dir": str(tmp_path / "run"),
        "rounds": 2,
        "gen": {
            "server": {"command": [*words, "--enforce-eager", "--dtype", "float32", "--max-num-seqs", "8"]},
            "max_new_tokens": 8,
        },
    }
    rounds.run(parse_recipe(values, "test"))
    rows = pairs_of(tmp_path / "run")
    assert all(row["y_logps"] and len(row["y_logps"]) == len(row["y_ids"]) for row in rows)
    assert (tmp_path / "run" / "policy" / "round=001" / "adapter_model.safetensors").exists()
