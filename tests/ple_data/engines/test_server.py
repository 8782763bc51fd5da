"""Engine `server` against a real vLLM server on the CPU, killed and started again; and what is said where none is."""

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest
from transformers import AutoTokenizer

from ple_data.engines import Request, Sampling, distance_of, server
from ple_data.engines.server import ServerEngine, same_model
from ple_data.sampling.generate import generate
from ple_data.storage.store import Store
from ple_data.storage.verify import verify
from schemas.errors import PleError, UsageError
from schemas.options import Gen
from schemas.records import Probe, read_record
from tests import tiny
from tests.ple_data.engines.test_engines import AutoModelForCausalLM, assert_true_logps, requests_for, spec_of
from tests.vllmserver import VllmServer


@pytest.fixture(scope="module")
def running(vllm_python: str, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    words = ["--model", str(policy), "--served-model-name", "any", "--enable-lora", "--max-num-seqs", "8"]
    words += ["--max-model-len", "1024"]
    found = VllmServer(vllm_python, log, *words, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True")
    try:
        found.start()
        found.wait()
        yield found
    finally:
        found.kill(signal.SIGTERM)


@pytest.fixture
def run(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """generate() into `tmp_path / data`, 40 queries in units of 4."""
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(server, "PAUSE", 0.2)
    queries = tmp_path / "q.jsonl"
    queries.write_text("".join(json.dumps({"id": f"q{n}", "x": x}) + "\n" for n, x in enumerate(tiny.corpus()[:40])))

    def call(*endpoints: str, data: str = "data", **options: Any) -> Any:
        given = {"model": str(policy), "principles": "imdb", "round": 0, "max_new_tokens": 6, "unit_size": 4}
        given["engine_arg"] = ("patience=200",)
        return generate(Gen(data=tmp_path / data, queries=str(queries), endpoint=endpoints, **given | options))

    return call


def committed(data: Path) -> pl.DataFrame:
    store = Store(data)
    assert [str(problem) for problem in verify(store) if problem.severity == "error"] == []
    return store.scan("responses").collect().sort("query_id")


def assert_own_logps(model: Any, rows: pl.DataFrame) -> None:
    """Those of the model for the sampled ids, y's given x and y_prompt's given [p, x]."""
    tokenizer = tiny.tiny_tokenizer()
    for row in rows.to_dicts():
        guided = tuple(tokenizer(f"{row['principle']}\n{row['x']}").input_ids)
        for arm, prompt in (("y", tuple(row["x_ids"])), ("y_prompt", guided)):
            assert len(row[f"{arm}_ids"]) <= 6
            assert_true_logps(model, Request(0, prompt, 0), row[f"{arm}_ids"], row[f"{arm}_logps"], atol=1e-3)


@pytest.mark.vllm
def test_rows_are_those_of_the_model_and_of_the_adapter(
    running: VllmServer, run: Any, policy: Path, adapter: Path, tmp_path: Path, capsys: Any
) -> None:
    from peft import PeftModel

    run(running.address, samples=2)
    rows = committed(tmp_path / "data")
    assert rows.height == 80
    assert rows["y_ids"].n_unique() > 20
    assert_own_logps(AutoModelForCausalLM.from_pretrained(policy).eval(), rows.head(8))
    run(running.address, f"{running.address}/v1", data="other", adapter=str(adapter), stop=("e",))
    rows = committed(tmp_path / "other")
    assert rows.height == 40
    assert_own_logps(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy), adapter).eval(), rows[:8])
    assert not any("e" in text for text in rows["y"])
    served = [model["id"] for model in httpx.get(f"{running.address}/v1/models", trust_env=False).json()["data"]]
    assert served == ["any"]  # the adapter was taken off
    again = run(running.address, data="again", seed=0, temperature=0.0)
    run(running.address, data="once more", seed=1, temperature=0.0)
    assert again.rows_sampled == 40
    run(running.address, data="of one", seed=3, top_k=1)
    run(running.address, data="of the likeliest", seed=3, min_p=1.0)
    for same in ("of one", "of the likeliest"):
        assert committed(tmp_path / same)["y"].equals(committed(tmp_path / "again")["y"])
    run(running.address, data="penalized", temperature=0.0, repetition_penalty=3.0)
    assert not committed(tmp_path / "penalized")["y"].equals(committed(tmp_path / "again")["y"])
    assert committed(tmp_path / "again")["y"].equals(committed(tmp_path / "once more")["y"])


@pytest.mark.vllm
@pytest.mark.long
def test_a_server_that_is_killed_and_started_again_loses_and_doubles_nothing(
    running: VllmServer, run: Any, adapter: Path, tmp_path: Path
) -> None:
    store, failed = Store(tmp_path / "data"), []

    def work() -> None:
        try:
            run(running.address, adapter=str(adapter), samples=8, max_new_tokens=48)
        except BaseException as error:
            failed.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive() and len(store.shards("responses")) < 3:
        worker.join(0.05)
    assert worker.is_alive(), failed
    running.kill()
    running.start()
    running.wait()
    worker.join(120)
    assert failed == []
    rows = committed(tmp_path / "data")
    assert rows.height == 320
    assert rows.select("query_id", "sample").n_unique() == 320


@pytest.mark.vllm
def test_another_model_is_refused(running: VllmServer, run: Any, policy: Path, tmp_path: Path) -> None:
    other = tiny.policy_of(tmp_path / policy.name, AutoTokenizer.from_pretrained(policy), seed=1)
    with pytest.raises(UsageError, match=r"serves .*, and --model is .*: start it with that model"):
        run(running.address, data="a", model=str(other))
    with pytest.raises(UsageError, match=r"start it with --max-model-len"):
        run(running.address, data="b", max_new_tokens=1000)
    run(running.address, limit=4)
    store = Store(tmp_path / "data")
    record = tmp_path / "data" / ".ple" / "rounds" / "probe-round=000.json"
    (one, *rest) = read_record(Probe, record).logps
    record.unlink()
    store.save_probe(Probe(round=0, logps=[{token: logp - 0.5 for token, logp in one.items()}, *rest]))
    shutil.rmtree(tmp_path / "data" / "responses")
    shutil.rmtree(tmp_path / "data" / ".ple" / "commits")
    with pytest.raises(UsageError, match=r"was begun with another policy .* differ by 0\.1"):
        run(running.address, limit=4)


def test_a_round_that_a_wrong_server_began_can_be_begun_again(run: Any, policy: Path, tmp_path: Path) -> None:
    vllm, data = StandIn(policy), tmp_path / "data"
    with other_server(vllm) as address:
        run(address, limit=4)
        vllm.logps = {0.0: -2.0, 2.0: -2.0}
        for folder in ("responses", ".ple/commits"):
            shutil.rmtree(data / folder)
        with pytest.raises(
            UsageError, match=r", or, as nothing of it is committed yet, remove (\S+probe-round=000.json)$"
        ):
            run(address, limit=4)
        (data / ".ple" / "rounds" / "probe-round=000.json").unlink()
        assert run(address, limit=4).rows_sampled == 4


def test_how_far_two_probes_are_apart() -> None:
    one = [{"1": -1.0, "2": -2.0}, {"3": -1.5}]
    assert distance_of(one, one) == 0
    assert distance_of(one, [{"1": -1.5, "9": -2.0}, {"3": -1.5}]) == 0.25
    assert distance_of(one, [{"8": -1.0, "9": -2.0}, {"3": -1.5}]) == float("inf")
    assert distance_of(one, one[:1]) == float("inf")


def test_the_name_of_a_model_on_a_server(policy: Path, tmp_path: Path) -> None:
    assert same_model("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B")
    assert same_model("mine/Qwen2.5-7B", "Qwen/Qwen2.5-7B") is False
    assert same_model("/away/sft2", "run/sft") is False
    assert same_model("/away/sft", "run/sft") is None
    assert same_model(str(policy), policy.name) is None
    assert same_model(str(policy), f"{policy}/") is True
    (tmp_path / "a").mkdir()
    there, other = (Path(shutil.copytree(policy, tmp_path / name / "sft")) for name in "ab")
    assert same_model(str(there), str(other)) is True
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    assert same_model(str(there), str(other)) is False


def test_a_model_of_the_same_name_that_is_another_is_refused(run: Any, policy: Path, tmp_path: Path) -> None:
    other = shutil.copytree(policy, tmp_path / policy.name)
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    with other_server(StandIn(other)) as address, pytest.raises(UsageError, match="start it with that model"):
        run(address)


def test_a_model_that_cannot_be_seen_is_known_by_its_name_and_vocabulary(run: Any, policy: Path, capfd: Any) -> None:
    vllm = StandIn(Path("/away") / policy.name)
    with other_server(vllm) as address:
        run(address, limit=4)
        assert capfd.readouterr().err.count("only the name was compared: it cannot be seen from here") == 1
        vllm.first_id = 7
        with pytest.raises(UsageError, match=r"reads 'The' as other token ids than the tokenizer of --model"):
            run(address, data="other", limit=4)
        vllm.first_id = None
        run(address, data="silent", limit=4)
    assert "vocabularies were not compared" in capfd.readouterr().err


@pytest.mark.parametrize(("cold", "hot"), [(-1.0, -0.5), (2.0, 2.0)], ids=["processed", "logits"])
def test_log_probabilities_of_another_kind_are_refused(run: Any, policy: Path, cold: float, hot: float) -> None:
    vllm = StandIn(policy)
    vllm.logps = {0.0: cold, 2.0: hot}
    with other_server(vllm) as address, pytest.raises(UsageError, match="start it without --logprobs-mode"):
        run(address)


def test_an_adapter_that_the_server_cannot_load_is_said_at_once(run: Any, policy: Path, adapter: Path) -> None:
    vllm = StandIn(policy)
    vllm.load_status = 500
    with other_server(vllm) as address, pytest.raises(UsageError, match=r"cannot load the adapter .*--max-lora-rank"):
        run(address, adapter=str(adapter))
    assert vllm.loaded == 2


@pytest.mark.parametrize(
    "setting", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"}]
)
def test_an_adapter_that_no_server_can_load_is_refused_before(
    run: Any, adapter: Path, tmp_path: Path, setting: dict[str, Any]
) -> None:
    other = shutil.copytree(adapter, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | setting))
    with pytest.raises(UsageError, match=f"has {next(iter(setting))}.*, which vllm cannot load"):
        run("http://127.0.0.1:1", adapter=str(other))


def test_a_dead_address_beside_a_live_one_holds_nobody_up(
    run: Any, policy: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at once and not again before its time, whoever's turn begins with it."""
    looked: list[str] = []
    look = server._Server._look
    monkeypatch.setattr(server, "PAUSE", 60.0)
    monkeypatch.setattr(server._Server, "_look", lambda self: (looked.append(self.what), look(self))[1])
    with other_server(StandIn(policy)) as address:
        run("http://127.0.0.1:1", address, engine_arg=("concurrency=4",))
    assert committed(tmp_path / "data").height == 40
    assert [what.rpartition(" ")[2] for what in looked] == ["http://127.0.0.1:1", address]
    assert capfd.readouterr().err.count("http://127.0.0.1:1 failed 2 times") == 1


def test_patience_begins_with_the_failure(run: Any, policy: Path, tmp_path: Path) -> None:
    vllm = StandIn(policy)
    vllm.slow_failures, vllm.slow = 2, 1.0
    with other_server(vllm) as address:
        run(address, engine_arg=("patience=0.5", "concurrency=1"), limit=1)
    assert committed(tmp_path / "data").height == 1


def test_what_a_server_breaks_off_as_it_ends_is_asked_again(run: Any, policy: Path, tmp_path: Path, capfd: Any) -> None:
    vllm = StandIn(policy)
    vllm.aborts = 1
    with other_server(vllm) as address:
        run(address)
    assert committed(tmp_path / "data").height == 40
    assert "broke a response off, as it does when it is ended: asking again for 200 s" in capfd.readouterr().err


def test_what_does_not_go_together_is_said(run: Any) -> None:
    with pytest.raises(UsageError, match="--endpoint is for --engine server, not for hf"):
        run("http://127.0.0.1:1", engine="hf")
    with pytest.raises(UsageError, match="--engine server needs the address"):
        run(engine="server")
    with pytest.raises(UsageError, match="the number type is the server's own"):
        run("http://127.0.0.1:1", dtype="float32")
    with pytest.raises(UsageError, match="no such argument"):
        run("http://127.0.0.1:1", engine_arg=("concurency=3",))
    with pytest.raises(UsageError, match="--engine-arg endpoints: use --endpoint"):
        run(engine="server", engine_arg=('endpoints=["http://127.0.0.1:1"]',))


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("concurrency=0", "concurrency must be a whole number of at least 1, not 0"),
        ("concurrency=x", "concurrency must be a whole number of at least 1, not 'x'"),
        ("concurrency=true", "concurrency must be a whole number of at least 1, not True"),
        ("timeout=0", "timeout must be a number of at least 0.001, not 0"),
        ("patience=-1", "patience must be a number of at least 0.0, not -1"),
    ],
)
def test_an_argument_that_is_no_such_number_is_refused(run: Any, arg: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^--engine-arg {message}$"):
        run("http://127.0.0.1:1", engine_arg=(arg,))


def test_a_server_that_is_not_there_is_said_and_again_after_some_patience(run: Any, capfd: Any) -> None:
    with pytest.raises(PleError, match=r"the server at http://127.0.0.1:1 failed 2 times"):
        run("http://127.0.0.1:1", engine_arg=("patience=0.5",))
    assert capfd.readouterr().err.count("asking again for 0 s") == 1


@pytest.mark.parametrize("answer", ["[]", '"x"', "{}", '{"data": 3}', '{"data": [1]}', '{"data": [{}]}', "<html>", ""])
def test_what_is_no_server_of_models_is_said(answer: str, run: Any) -> None:
    with other_server(answer) as address, pytest.raises(UsageError, match=r"does not say which models it serves"):
        run(address)


def test_answers_of_another_form_are_said(run: Any, policy: Path) -> None:
    models = {"data": [{"id": "any", "root": str(policy), "max_model_len": "long"}]}
    with other_server(json.dumps(models)) as address, pytest.raises(UsageError, match="gave no log-probabilities"):
        run(address)


def test_an_adapter_that_another_process_took_off_is_loaded_again(
    run: Any, policy: Path, adapter: Path, tmp_path: Path
) -> None:
    vllm = StandIn(policy)
    vllm.forget_at = 20
    with other_server(vllm) as address:
        run(address, adapter=str(adapter), engine_arg=("patience=20", "concurrency=3"))
    assert committed(tmp_path / "data").height == 40
    assert vllm.loaded == 2
    assert vllm.adapters == []


def test_a_model_that_a_server_does_not_know_is_said_at_once(run: Any, policy: Path) -> None:
    vllm = StandIn(policy)
    vllm.names.clear()
    with other_server(vllm) as address, pytest.raises(PleError, match="refused the request: status 404"):
        run(address)


def test_what_hangs_at_a_server_is_cut_at_the_end(policy: Path, adapter: Path, capfd: Any) -> None:
    vllm = StandIn(policy)
    vllm.hang_at = 2
    with other_server(vllm) as address:
        engine = ServerEngine(spec_of(policy, adapter), {"endpoints": [address]})
        assert next(engine.sample(iter([requests_for(policy)[:5]]), Sampling(max_new_tokens=6)))
        began = time.monotonic()
        engine.close()
        assert time.monotonic() - began < 5
        assert (vllm.loaded, vllm.adapters) == (1, [])
        vllm.go_on.set()
    assert capfd.readouterr().err == ""


def test_a_look_that_hangs_is_cut_at_the_end(policy: Path, adapter: Path) -> None:
    """The server's machine stands still: it takes connections, and answers nothing."""
    vllm = StandIn(policy)
    with other_server(vllm) as address:
        engine = ServerEngine(spec_of(policy, adapter), {"endpoints": [address], "timeout": 30, "concurrency": 4})
        vllm.still.clear()
        engine._servers[0].known = False

        handed_out = threading.Event()

        def units() -> Iterator[Sequence[Request]]:
            yield requests_for(policy)[:7]
            handed_out.set()

        def look() -> None:
            with suppress(PleError, CancelledError):
                next(engine.sample(units(), Sampling(max_new_tokens=6)))

        looking = threading.Thread(target=look)
        looking.start()
        assert vllm.asked_still.wait(20)
        assert handed_out.wait(20)
        began = time.monotonic()
        engine.close()
        assert time.monotonic() - began < 5
        vllm.still.set()
        looking.join(10)


class StandIn:
    """Answers as vLLM's server does, as far as the engine sees: adapters come and go, a response is one token."""

    def __init__(self, policy: Path) -> None:
        self.names, self.adapters, self.loaded = ["any"], list[str](), 0
        self.sampled, self.forget_at, self.hang_at, self.go_on = 0, 1000, 1000, threading.Event()
        self.first_id: int | None = 0
        self.logps = {0.0: -1.0, 2.0: -1.0}
        self.load_status, self.slow_failures, self.slow, self.aborts = 200, 0, 0.0, 0
        self.still, self.asked_still = threading.Event(), threading.Event()
        self.still.set()
        self._tokenizer = tiny.tiny_tokenizer()
        self._models = [{"id": "any", "root": str(policy), "max_model_len": 2048}]

    def __call__(self, path: str, body: Any) -> tuple[int, str]:
        if not self.still.is_set():
            self.asked_still.set()
            self.still.wait(60)
        if path == "/tokenize":
            ids = self._tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"]).input_ids
            return (
                (404, "{}")
                if self.first_id is None
                else (200, json.dumps({"tokens": [self.first_id + ids[0], *ids[1:]]}))
            )
        if path == "/v1/models":
            adapters = [{"id": name, "parent": "any"} for name in self.adapters]
            return 200, json.dumps({"data": [*self._models, *adapters]})
        if path == "/v1/load_lora_adapter":
            self.loaded += 1
            if self.load_status != 200:
                return self.load_status, '{"error": "rank 64 is over max_lora_rank 16"}'
            self.adapters = [body["lora_name"]]
        if path == "/v1/unload_lora_adapter":
            self.adapters = []
        if path != "/v1/completions":
            return 200, "{}"
        if body["model"] not in [*self.names, *self.adapters]:
            return 404, '{"error": "the model does not exist"}'
        found: dict[str, Any] = {"token_ids": [5], "finish_reason": "length", "logprobs": {"token_logprobs": [-1.0]}}
        if "return_token_ids" not in body:
            found = {"logprobs": {"top_logprobs": [{"token_id:5": self.logps[body["temperature"]]}]}}
        else:
            self.sampled += 1
            if self.sampled <= self.slow_failures:
                time.sleep(self.slow)
                return 500, "{}"
            if self.sampled <= self.aborts:
                found["finish_reason"] = "abort"
            if self.sampled == self.forget_at:
                self.adapters = []
            if self.sampled >= self.hang_at:
                self.go_on.wait(60)
        return 200, json.dumps({"choices": [found]})


@contextmanager
def other_server(answer: str | Callable[[str, Any], tuple[int, str]]) -> Iterator[str]:
    """The address of a server that gives one answer to everything, or what a function gives."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, text = (200, answer) if isinstance(answer, str) else answer(self.path, json.loads(body or b"null"))
            with suppress(OSError):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """Whoever asked has gone."""

    with Server(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()
