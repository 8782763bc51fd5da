"""Reward models at an address in the forms of other servers: what is asked, what is read, and what is refused."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ple_data.rewards import RewardModel, as_read, check_reward_model, load_reward_model, options_of
from ple_data.rewards.endpoint import API_KEY_VARIABLE
from ple_data.rewards.forms import number_of
from schemas.errors import PleError, UsageError
from schemas.options import Rewards

CHAT = '[{"role": "user", "content": "Why?"}]'
ROWS = [("The film", " was great."), (CHAT, " So. "), ("\n\nHuman: Why?\n\nAssistant:", "So.")]
TEXTS = ["The film was great.", "\n\nHuman: Why?\n\nAssistant: So. ", "\n\nHuman: Why?\n\nAssistant: So."]
WITHOUT_TEMPLATE = (400, '{"error": {"message": "default chat template is no longer allowed"}}')


class Server(http.server.ThreadingHTTPServer):
    """Keeps what it is asked, and answers as `answer(path, body)` says: a status and a text."""

    def __init__(self, answer: Callable[[str, Any], tuple[int, str]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.asked = answer, list[tuple[str, Any]]()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        status, text = self.server.answer(self.path, body)
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", API_KEY_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    servers = []

    def start(answer: Callable[[str, Any], tuple[int, str]]) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def openrlhf(path: str, body: Any) -> tuple[int, str]:
    """As openrlhf/cli/serve_rm.py answers: the rewards three times."""
    rewards = [len(text) / 10 for text in body["query"]]
    return 200, json.dumps({"rewards": rewards, "scores": rewards, "extra_logs": {"dummy_scores": rewards}})


def vllm(*outputs: float, template: bool = False) -> Callable[[str, Any], tuple[int, str]]:
    """As vLLM answers: outputs of a text, the first its length; the items in any order."""

    def answer(path: str, body: Any) -> tuple[int, str]:
        if "messages" in body and not template:
            return WITHOUT_TEMPLATE
        texts = body.get("input") or ["".join(turn["content"] for turn in body["messages"])]
        found = [[float(len(text)), *outputs] for text in texts]
        field = {"/classify": "probs", "/pooling": "data"}[path]
        items = [{"index": index, field: values} for index, values in enumerate(found)]
        return 200, json.dumps({"object": "list", "data": items[::-1]})

    return answer


def load(server: Server, form: str, **options: Any) -> RewardModel:
    return load_reward_model(server.url, Rewards(reward_format=form, **options))


def test_openrlhf_is_asked_for_one_text_of_x_and_y(serve):
    server = serve(openrlhf)
    model = load(server, "openrlhf")
    assert model.score(ROWS) == [len(text) / 10 for text in TEXTS]
    prompts = ["The film", "\n\nHuman: Why?\n\nAssistant: ", "\n\nHuman: Why?\n\nAssistant:"]
    assert server.asked == [("/get_reward", {"query": TEXTS, "prompts": prompts, "labels": ["", "", ""]})]
    assert model.name == f"openrlhf:{server.url}/get_reward"
    assert as_read(model, ["Why?"], chat=True) == [CHAT], "a text that was asked as a chat is a dialogue"


@pytest.mark.parametrize(("form", "more"), [("vllm-classify", {}), ("vllm-pooling", {"encoding_format": "float"})])
def test_vllm_without_a_chat_template_is_asked_for_one_text(form, more, serve, capsys):
    server = serve(vllm())
    model = load(server, form)
    assert model.name == load(server, form, join="text").name
    assert "it reads x and y as --join text has them" in capsys.readouterr().err
    assert model.runs_on
    assert model.score(ROWS * 20) == [float(len(text)) for text in TEXTS] * 20
    (path, probe), *asked = server.asked
    assert probe["messages"] == [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert {path, *(path for path, _ in asked)} == {f"/{form.partition('-')[2]}"}
    assert sorted(len(body["input"]) for _, body in asked) == [28, 32]
    assert all(body | {"input": TEXTS} == {"input": TEXTS, "use_activation": False, **more} for _, body in asked)


@pytest.mark.parametrize("form", ["vllm-classify", "vllm-pooling"])
def test_vllm_with_a_chat_template_is_asked_for_chats(form, serve):
    server = serve(vllm(template=True))
    model = load(server, form)
    assert not model.runs_on
    assert model.score(ROWS) == [18.0, 7.0, 7.0]
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    assert sum(body["messages"] == turns for _, body in server.asked) == 2
    asked = len(server.asked)
    assert load(server, form, join="text").score(ROWS) == [float(len(text)) for text in TEXTS]
    assert len(server.asked) == asked + 1, "nothing is asked where --join says it"


def test_an_output_of_several_is_chosen(serve):
    server = serve(vllm(-1.0))
    with pytest.raises(UsageError, match="it gives 2 outputs: choose the one that is the reward with --output-index"):
        load(server, "vllm-classify").score(ROWS)
    with pytest.raises(UsageError, match="it has no output 2: --output-index is at most 1"):
        load(server, "vllm-classify", output_index=2).score(ROWS)
    assert load(server, "vllm-classify", output_index=1).score(ROWS) == [-1.0] * 3


@pytest.mark.parametrize(
    ("value", "output", "number"),
    [
        (1, None, 1.0),
        ([0.5], None, 0.5),
        ([0.5, 2], 1, 2.0),
        ([[1.0], [2.0]], None, 2.0),
        ([[1.0, 3.0], [2.0, 4.0]], 1, 4.0),
        ([], None, None),
        ([[]], None, None),
        (True, None, None),
        ("1", None, None),
        ([None], None, None),
        ({}, None, None),
    ],
)
def test_the_number_of_a_row(value, output, number):
    """Of a list for each token, as reward models with an output a token give, the last token's counts."""
    assert number_of(value, output) == number


@pytest.mark.parametrize(
    ("form", "answer", "message"),
    [
        ("openrlhf", '{"scores": [1, 2, 3]}', r'expected {"rewards": \[\.\.\.\]}, got'),
        ("openrlhf", '{"rewards": [1, 2]}', r'"rewards" must be a list of 3 numbers, got 2 values'),
        ("openrlhf", '{"rewards": 3}', "got int"),
        ("openrlhf", '{"rewards": [1, "2", 3]}', "a list of 3 numbers"),
        ("openrlhf", "[1, 2, 3]", 'expected {"rewards"'),
        ("vllm-classify", '{"data": [{"index": 0, "data": [1]}]}', r'expected {"data": \[{"probs"'),
        ("vllm-classify", '{"data": [{"index": 0, "probs": [1]}]}', "a list of 3 numbers, got 1 values"),
        ("vllm-classify", '{"data": [{"probs": [1]}]}', 'expected {"data"'),
        ("vllm-pooling", '{"data": "AAAA"}', 'expected {"data"'),
        ("vllm-pooling", '{"data": [1, 2, 3]}', 'expected {"data"'),
        ("vllm-pooling", "{broken", 'expected {"data"'),
        ("ple", '{"scores": [[1], [2], [3]]}', '"scores" must be a list of 3 numbers'),
    ],
)
def test_an_answer_of_another_form_is_one_sentence(form, answer, message, serve):
    server = serve(lambda path, body: (200, answer))
    with pytest.raises(PleError, match=message) as caught:
        load(server, form, **({} if form == "ple" else {"join": "text"})).score(ROWS)
    assert "\n" not in str(caught.value)


def test_the_name_holds_the_form_the_output_and_the_join():
    def name(url: str, **options: Any) -> str:
        return load_reward_model(url, Rewards(**options)).name

    assert name("http://h/score") == "http://h/score"
    assert name("http://h:5", reward_format="openrlhf") == name("http://h:5/get_reward", reward_format="openrlhf")
    assert name("http://h", reward_format="vllm-classify", join="text") == "vllm-classify+text:http://h/classify"
    assert (name("http://h/a?token=sesame", reward_format="vllm-pooling", join="chat", output_index=0)).startswith(
        "vllm-pooling[0]+chat:http://h/a?"
    )
    assert "sesame" not in name("http://h/a?token=sesame", reward_format="openrlhf")


def test_each_of_several_takes_the_options_that_its_kind_has():
    specs = ["http://h", "models/deberta[1]", "judge:m"]
    plain, pair = Rewards(), Rewards(join="pair")
    assert options_of(specs, pair) == [plain, pair, plain]
    assert options_of(specs[:1], pair) == [pair], "alone it refuses it"
    index = Rewards(reward_format="vllm-classify", output_index=1, join="text")
    assert options_of(specs, index) == [index, index, Rewards(reward_format="vllm-classify")]
    with pytest.raises(UsageError, match="--output-index 1: none of the reward models takes it"):
        options_of(["http://h", "judge:m"], Rewards(output_index=1))


@pytest.mark.parametrize(("form", "join"), [("openrlhf", "chat"), ("openrlhf", "pair"), ("vllm-classify", "pair")])
def test_a_join_that_the_form_does_not_have_is_refused(form, join):
    with pytest.raises(UsageError, match=f"--join {join}: --reward-format {form} has auto, text"):
        check_reward_model("http://h", Rewards(reward_format=form, join=join))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"join": "pair"}, "--join pair: --reward-format ple has auto"),
        ({"output_index": 0}, "--output-index 0: --reward-format ple gives one number a row"),
    ],
)
def test_what_the_form_of_ple_has_no_use_for_is_refused(options, message):
    with pytest.raises(UsageError, match=f"^{message}$"):
        check_reward_model("http://h", Rewards(**options))


def test_another_fault_of_the_server_is_no_lack_of_a_template(serve):
    server = serve(lambda path, body: (404, "no such page"))
    with pytest.raises(PleError, match="refused the request: status 404"):
        load(server, "vllm-classify")


def test_the_requests_in_flight_are_as_many_as_asked(serve):
    gate = threading.Barrier(3)

    def wait(path: str, body: Any) -> tuple[int, str]:
        gate.wait(20)
        return openrlhf(path, body)

    assert len(load(serve(wait), "openrlhf", reward_concurrency=3).score([("x", "y")] * 96)) == 96


def test_it_is_scored_and_known_by_the_command(serve, tmp_path: Path):
    from click.testing import CliRunner

    import cli
    from ple_data.storage.store import Store
    from tests.ple_data.scoring.test_score import commit_unit

    server = serve(openrlhf)
    commit_unit(Store(tmp_path / "data"), 0)
    words = ["score", "--data", tmp_path / "data", "--reward-model", server.url, "--reward-format"]
    found = CliRunner().invoke(cli.ple, [*map(str, words), "openrlhf"])
    assert found.exit_code == 0, found.output
    assert Store(tmp_path / "data").reward_model() == f"openrlhf:{server.url}/get_reward"
    other = CliRunner().invoke(cli.ple, [*map(str, words), "ple"])
    assert other.exit_code == 2
    assert "two reward models are never mixed" in other.output
