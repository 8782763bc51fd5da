"""Reward models: how texts are joined and cut, that a batch changes no reward, and clear errors."""

import http.server
import json
import math
import re
import shutil
import threading
import time
from pathlib import Path

import pytest

from ple_data.inputs.chat import as_chat, as_text
from ple_data.rewards import as_read, load_reward_model
from ple_data.rewards.classifier import ClassifierReward, _batches
from ple_data.rewards.endpoint import API_KEY_VARIABLE, HttpReward
from ple_data.rewards.texts import encode
from schemas.errors import PleError, UsageError
from schemas.options import Rewards
from tests import tiny
from tests.conftest import ROOT

HH = "\n\nHuman: What is a film?\n\nAssistant: A story.\n\nHuman: Is it long?\n\nAssistant:"
CHAT = json.dumps(
    [
        {"role": "user", "content": "What is a film?"},
        {"role": "assistant", "content": "A story."},
        {"role": "user", "content": "Is it long?"},
    ]
)
ROWS = [
    ("The film", " was great."),
    ("This story seems", ""),
    (HH, " It is not long, my friend, and one scene was wonderful and funny."),
    ("A good actor helps", " the question " * 9),
    ("é", "!"),
    ("The answer", tiny.EOS),
    ("The answer", tiny.PAD),
]
"""Of several lengths; the last two end with the ids that are used for padding."""


# --- texts ----------------------------------------------------------------------------------------


def test_text_join_is_plain_concatenation_with_the_tokenizers_special_tokens():
    tokenizer = tiny.tiny_tokenizer(add_bos=True)
    ids = encode(tokenizer, "The film", " was great.").ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "The film was great."


def test_text_join_of_a_stored_chat_is_a_dialogue():
    assert as_text(CHAT) == HH + " "
    assert as_text("[1, 2]") == "[1, 2]"
    assert as_text("[not json") == "[not json"


@pytest.mark.parametrize(
    ("x", "y", "text"),
    [
        ("\n\nHuman: Why?\n\nAssistant:", "So.", "\n\nHuman: Why?\n\nAssistant: So."),
        ("\n\nHuman: Why?\n\nAssistant:", " So.", "\n\nHuman: Why?\n\nAssistant: So."),
        ("\n\nHuman: Why?\n\nAssistant:", "\nSo.", "\n\nHuman: Why?\n\nAssistant:\nSo."),
        ('[{"role": "user", "content": "Why?"}]', "So.", "\n\nHuman: Why?\n\nAssistant: So."),
        ('[{"role": "user", "content": "Why?"}]', " So.", "\n\nHuman: Why?\n\nAssistant: So."),
        ("The fil", "m was", "The film was"),
    ],
)
def test_text_join_of_a_dialogue_has_one_space_before_the_answer(x: str, y: str, text: str):
    tokenizer = tiny.tiny_tokenizer()
    assert encode(tokenizer, x, y, join="text").ids == tokenizer(text).input_ids


def test_a_text_that_was_asked_as_a_chat_is_a_dialogue_to_a_model_that_reads_one_text(reward: Path):
    model = load_reward_model(str(reward))
    [x] = as_read(model, ["Why?"], chat=True)
    assert encode(model._tokenizer, x, "So.").ids == model._tokenizer("\n\nHuman: Why?\n\nAssistant: So.").input_ids
    assert as_read(model, ["Why?"], chat=False) == ["Why?"]
    assert as_read(load_reward_model(str(reward), Rewards(join="pair")), ["Why?"], chat=True) == ["Why?"]


@pytest.mark.parametrize("x", [HH, CHAT])
def test_chat_join_uses_the_template_over_the_turns_and_the_answer(x: str):
    tokenizer = tiny.tiny_tokenizer(chat=True, add_bos=True)
    ids = encode(tokenizer, x, " No.\n").ids
    assert tokenizer.decode(ids) == (
        f"{tiny.BOS}<user>What is a film?</user>\n<assistant>A story.</assistant>\n<user>Is it long?</user>\n"
        "<assistant>No.</assistant>\n"
    )
    assert ids.count(tokenizer.bos_token_id) == 1


def test_chat_join_of_a_plain_text_is_one_user_turn():
    assert as_chat("Is it long? Human: or not") == [{"role": "user", "content": "Is it long? Human: or not"}]


def test_a_reward_does_not_depend_on_the_day():
    tokenizer = tiny.tiny_tokenizer(chat="{{ strftime_now('%Y-%m-%d') }} " + tiny.CHAT_TEMPLATE)
    assert tokenizer.decode(encode(tokenizer, "Why?", "So.").ids).startswith("2024-07-26 ")


def test_chat_template_that_refuses_a_query_is_a_clear_error():
    tokenizer = tiny.tiny_tokenizer(chat="no-system")
    chat = json.dumps([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}])
    with pytest.raises(PleError, match=r"System role not supported.*x begins"):
        encode(tokenizer, chat, "Hi")


def test_pair_join_gives_two_segments(tmp_path: Path):
    tokenizer = bert_tokenizer()
    encoded = encode(tokenizer, "the film", "was great", join="pair")
    assert tokenizer.decode(encoded.ids) == "[CLS] the film [SEP] was great [SEP]"
    assert encoded.token_type_ids == [0, 0, 0, 0, 1, 1, 1]
    cut = encode(tokenizer, "the film", "was great", join="pair", max_length=6)
    assert tokenizer.decode(cut.ids) == "[CLS] film [SEP] was great [SEP]"
    assert cut.token_type_ids == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("add_bos", [True, False])
def test_long_texts_lose_the_beginning_of_x(add_bos: bool):
    tokenizer = tiny.tiny_tokenizer(add_bos=add_bos)
    whole = encode(tokenizer, "the film was great " * 20, "and long.")
    cut = encode(tokenizer, "the film was great " * 20, "and long.", max_length=10)
    assert not whole.cut
    assert cut.cut
    assert len(cut.ids) == 10
    assert cut.ids[1:] == whole.ids[-9:]
    assert (cut.ids[0] == tokenizer.bos_token_id) == add_bos


def test_join_that_does_not_fit_the_tokenizer_is_refused():
    with pytest.raises(UsageError, match="no chat template"):
        encode(tiny.tiny_tokenizer(), "a", "b", join="chat")


# --- classifiers ----------------------------------------------------------------------------------


def bert_tokenizer():
    """A word-level tokenizer of the BERT kind: [CLS] x [SEP] or [CLS] x [SEP] y [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "film", "was", "great", "story", "seems", "long"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **names,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_bert(directory: Path) -> Path:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(3)
    tokenizer = bert_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        num_labels=1,
        initializer_range=0.2,
    )
    BertForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def tiny_gpt2(directory: Path, *, padding_side: str = "right") -> Path:
    """GPT-2 with learnt positions, no padding token in config or tokenizer, as the real one."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(4)
    tokenizer = tiny.tiny_tokenizer(pad=False)
    tokenizer.padding_side = padding_side
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=256,
        num_labels=1,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2ForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def edit_config(directory: Path, **changes) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tokenizer(directory: Path, **changes) -> None:
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def llama_left(directory: Path) -> Path:
    tiny.tiny_reward(directory)
    edit_tokenizer(directory, padding_side="left")
    return directory


def llama_without_pad(directory: Path) -> Path:
    """The config names no padding id; the tokenizer pads with EOS, as many people set it."""
    tiny.tiny_reward(directory, pad=False)
    edit_tokenizer(directory, pad_token=tiny.EOS)
    return directory


def gpt2_left(directory: Path) -> Path:
    return tiny_gpt2(directory, padding_side="left")


@pytest.mark.parametrize("make", [tiny.tiny_reward, llama_left, llama_without_pad, tiny_gpt2, gpt2_left, tiny_bert])
@pytest.mark.parametrize("join", ["text", "pair"])
def test_a_batch_of_one_and_of_many_agree(make, join: str, tmp_path: Path):
    make(tmp_path / "model")
    many = ClassifierReward(str(tmp_path / "model"), Rewards(join=join))
    single = ClassifierReward(str(tmp_path / "model"), Rewards(join=join, batch_tokens=1))
    together = many.score(ROWS)
    alone = single.score(ROWS)
    assert together == pytest.approx(alone, abs=1e-4)
    assert max(together) - min(together) > 0.01, "rewards that do not differ would hide a fault"


@pytest.mark.parametrize("make", [llama_without_pad, tiny_gpt2, gpt2_left])
def test_without_a_padding_id_the_reward_is_at_the_last_token(make, tmp_path: Path):
    """Padding with EOS would move it for the text that ends with EOS: checked against the bare model."""
    import torch
    from transformers import AutoModelForSequenceClassification

    directory = make(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    assert model.config.pad_token_id is None
    reward_model = ClassifierReward(str(directory), Rewards())
    expected = []
    for x, y in ROWS:
        ids = torch.tensor([encode(reward_model._tokenizer, x, y).ids])
        hidden = model.base_model(ids).last_hidden_state
        expected.append(model.score(hidden[0, -1]).item())
    assert reward_model.score(ROWS) == pytest.approx(expected, abs=1e-4)


def test_pair_and_text_join_are_different_reward_models(tmp_path: Path):
    directory = str(tiny_bert(tmp_path / "bert"))
    text, pair = (ClassifierReward(directory, Rewards(join=join)) for join in ("auto", "pair"))
    assert text.score([("the film", "was great")]) != pair.score([("the film", "was great")])
    assert pair.name == text.name + "+pair"


def test_cut_texts_are_counted_and_keep_the_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    directory = tiny.tiny_reward(tmp_path / "model")
    edit_tokenizer(directory, model_max_length=16)
    reward_model = ClassifierReward(str(directory), Rewards())
    long_x = "the film was great and my friend was sad "
    first, second, _ = reward_model.score([(long_x * 5, "No."), (long_x * 9, "No."), ("Yes", "No.")])
    assert first == pytest.approx(second, abs=1e-5)
    assert reward_model.truncated == 2
    assert "longer than" not in capfd.readouterr().err, "transformers' warning would mislead: the text was cut"


def test_limit_of_the_model_holds_where_the_tokenizer_has_none(tmp_path: Path):
    directory = tiny_gpt2(tmp_path / "model")
    reward_model = ClassifierReward(str(directory), Rewards())
    reward_model.score([("the film was great and my friend was sad " * 200, "No.")])
    assert reward_model.truncated == 1


def test_the_chosen_output_is_the_reward(tmp_path: Path):
    directory = str(tiny.tiny_reward(tmp_path / "model", num_labels=3))
    rewards = [ClassifierReward(directory, Rewards(output_index=index)).score(ROWS[:1])[0] for index in range(3)]
    assert len(set(rewards)) == 3
    names = {ClassifierReward(directory, Rewards(output_index=index)).name[-3:] for index in range(3)}
    assert names == {"[0]", "[1]", "[2]"}


def test_several_outputs_and_none_chosen_is_refused(tmp_path: Path):
    directory = tiny.tiny_reward(tmp_path / "model", num_labels=2)
    edit_config(directory, id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1})
    with pytest.raises(UsageError, match=r"2 outputs \(0 = bad, 1 = good\).*--output-index"):
        load_reward_model(str(directory))
    with pytest.raises(UsageError, match=r"no output 2"):
        load_reward_model(str(directory), Rewards(output_index=2))


def test_a_language_model_is_no_reward_model(policy: Path):
    with pytest.raises(UsageError, match=r"no trained LlamaForSequenceClassification.*score\.weight"):
        load_reward_model(str(policy))


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match=r"no config\.json"):
        load_reward_model(str(tmp_path))
    with pytest.raises(UsageError, match="neither a URL"):
        load_reward_model(str(tmp_path / "missing"))


def test_bfloat16_is_close_to_float32(reward: Path):
    exact = load_reward_model(str(reward)).score(ROWS)
    rounded = load_reward_model(str(reward), Rewards(reward_dtype="bfloat16")).score(ROWS)
    assert exact != rounded
    assert rounded == pytest.approx(exact, abs=0.15)


def test_batches_are_sorted_by_length_and_hold_the_budget():
    lengths = [3, 9, 1, 9, 4, 20, 2]
    batches = list(_batches(lengths, 18))
    assert batches == [[5], [1, 3], [4, 0, 6, 2]]
    assert sorted(row for batch in batches for row in batch) == list(range(7))
    assert list(_batches([], 18)) == []


# --- functions ------------------------------------------------------------------------------------


def write(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def test_function_of_a_file_and_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "neighbour.py", "bonus = 0.5\n")
    file = write(
        tmp_path / "myreward.py",
        "from neighbour import bonus\n"
        "def length(xs, ys):\n    return [len(x) + len(y) + bonus for x, y in zip(xs, ys)]\n",
    )
    monkeypatch.chdir(tmp_path)
    by_file = load_reward_model(f"{file}:length")
    by_module = load_reward_model("myreward:length")
    assert by_file.score([("ab", "cde"), ("", "")]) == by_module.score([("ab", "cde"), ("", "")]) == [5.5, 0.5]
    assert by_file.score([]) == []
    assert by_file.name.rpartition("@")[2] == by_module.name.rpartition("@")[2]
    before = by_file.name
    file.write_text(file.read_text() + "# changed\n")
    assert load_reward_model(f"{file}:length").name != before


def test_function_may_give_an_array(tmp_path: Path):
    file = write(
        tmp_path / "arrays.py",
        "import numpy, torch\n"
        "def array(xs, ys):\n    return numpy.ones(len(ys), dtype=numpy.float32)\n"
        "def tensor(xs, ys):\n    return torch.ones(len(ys))\n",
    )
    assert load_reward_model(f"{file}:array").score(ROWS) == [1.0] * len(ROWS)
    assert load_reward_model(f"{file}:tensor").score(ROWS) == [1.0] * len(ROWS)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1.0", "gave back float: expected a list of 2 numbers"),
        ("return [1.0]", "gave back 1 rewards for 2 responses"),
        ("return ['1', '2']", "gave back str '1' for response 0"),
        ("return [1.0, None]", "gave back NoneType 'None' for response 1"),
        ("return [1.0, 10**400]", "gave back int '1000.*' for response 1: expected a number"),
        ("return 'ab'", "gave back str: expected a list"),
        ("raise KeyError('no such word')", r"raised KeyError: 'no such word' \(.*bad\.py, line 2\)"),
        ("import json; json.loads('{')", r"raised JSONDecodeError: .*bad\.py, line 2\)"),
    ],
)
def test_function_that_misbehaves_is_named(body: str, message: str, tmp_path: Path):
    file = write(tmp_path / "bad.py", f"def f(xs, ys):\n    {body}\n")
    reward_model = load_reward_model(f"{file}:f")
    with pytest.raises(PleError, match=message):
        reward_model.score([("a", "b"), ("c", "d")])


def test_function_that_cannot_be_loaded_is_named(tmp_path: Path):
    file = write(tmp_path / "some.py", "value = 1\n")
    broken = write(tmp_path / "broken.py", "value = 1\ndef f(:\n")
    raising = write(tmp_path / "raising.py", "import json as f\n\nraise RuntimeError('no key')\n")
    with pytest.raises(UsageError, match="no function 'f'"):
        load_reward_model(f"{file}:f")
    with pytest.raises(UsageError, match="no function 'value'"):
        load_reward_model(f"{file}:value")
    with pytest.raises(UsageError, match="there is no file"):
        load_reward_model(f"{tmp_path}/none.py:f")
    with pytest.raises(UsageError, match=r"expected file\.py:function"):
        load_reward_model(f"{file}:")
    with pytest.raises(UsageError, match="no Python module 'no_such_module'"):
        load_reward_model("no_such_module:f")
    with pytest.raises(PleError, match=r"SyntaxError.*broken\.py, line 2"):
        load_reward_model(f"{broken}:f")
    with pytest.raises(PleError, match=r"RuntimeError: no key \(.*raising\.py, line 3"):
        load_reward_model(f"{raising}:f")


# --- HTTP -----------------------------------------------------------------------------------------


class RewardServer(http.server.ThreadingHTTPServer):
    """A real server whose reward is len(x) - len(y); `plan` lists how the first requests fail."""

    def __init__(self, plan: list) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.plan = plan
        self.lock = threading.Lock()
        self.sizes: list[int] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.now = self.most_at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: RewardServer

    def do_POST(self) -> None:
        inputs = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["inputs"]
        server = self.server
        with server.lock:
            fault = server.plan.pop(0) if server.plan else None
            server.sizes.append(len(inputs))
            server.keys.append(self.headers.get("Authorization"))
            server.times.append(time.monotonic())
            server.now += 1
            server.most_at_once = max(server.most_at_once, server.now)
        time.sleep(0.02)
        with server.lock:
            server.now -= 1
        scores = [len(row["x"]) - len(row["y"]) for row in inputs]
        if fault == "drop":
            return self.connection.close()
        if fault == "hang":
            time.sleep(2.0)
        if isinstance(fault, str) and fault.startswith("{"):
            return self._answer(200, fault)
        if isinstance(fault, tuple):
            status, wait = fault
            return self._answer(status, "busy", {"Retry-After": wait() if callable(wait) else wait})
        if isinstance(fault, int):
            return self._answer(fault, "no")
        return self._answer(200, json.dumps({"scores": scores}))

    def _answer(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch):
    """serve(plan) starts a reward server whose first requests fail as planned."""
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", API_KEY_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    servers = []

    def start(plan: list | None = None) -> RewardServer:
        server = RewardServer(plan or [])
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


MANY = [("x" * (i % 7), "y" * i) for i in range(100)]
EXPECTED = [float(len(x) - len(y)) for x, y in MANY]


def quick(server: RewardServer, **options) -> HttpReward:
    return HttpReward(server.url, **{"batch_size": 8, "first_wait": 0.01, **options})


def test_http_scores_in_order_in_batches_with_several_requests_in_flight(serve):
    server = serve()
    assert quick(server, in_flight=3).score(MANY) == EXPECTED
    assert sorted(server.sizes) == [4] + [8] * 12
    assert 1 < server.most_at_once <= 3
    assert quick(server).score([]) == []


def test_http_retries_what_may_pass(serve):
    server = serve([500, "drop", 429, "hang", (503, "0"), 502])
    assert quick(server, timeout=1.0).score(MANY) == EXPECTED
    assert len(server.sizes) >= 13 + 6


def test_http_waits_as_long_as_the_server_asks(serve):
    server = serve([(429, "1")])
    assert quick(server).score(MANY[:3]) == EXPECTED[:3]
    assert server.times[1] - server.times[0] >= 1.0


def test_http_retry_after_may_be_a_date(serve):
    from email.utils import formatdate

    server = serve([(503, lambda: formatdate(time.time() + 3, usegmt=True))])
    assert quick(server).score(MANY[:3]) == EXPECTED[:3]
    assert server.times[1] - server.times[0] >= 2.0


def test_http_gives_up_with_a_clear_error(serve):
    server = serve([500] * 50)
    with pytest.raises(PleError, match=r"failed 3 times, the last with status 500 'no'"):
        quick(server, tries=3).score(MANY)
    with pytest.raises(PleError, match=r"failed 2 times, the last with ConnectError"):
        HttpReward("http://127.0.0.1:9/score", tries=2, first_wait=0.01).score(MANY)


def test_http_error_ends_the_waiting_of_the_other_requests(serve):
    server = serve([(503, "30"), (503, "30"), 400])
    began = time.monotonic()
    with pytest.raises(PleError, match="refused the request: status 400"):
        quick(server, in_flight=3).score(MANY)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (400, "refused the request: status 400"),
        (401, "refused the request: status 401"),
        ("{}", r'expected {"scores": \[\.\.\.\]}, got'),
        ("{broken", r'expected {"scores"'),
        ('{"scores": [1, 2]}', r'"scores" must be a list of 3 numbers, got 2 values'),
        ('{"scores": [1, 2, "3"]}', '"scores" must be a list of 3 numbers'),
        ('{"scores": [1, 2, null]}', '"scores" must be a list of 3 numbers'),
        ('{"scores": 3}', "got int"),
    ],
)
def test_http_answer_that_cannot_pass_is_not_retried(fault, message: str, serve):
    server = serve([fault])
    with pytest.raises(PleError, match=message):
        quick(server).score(MANY[:3])
    assert len(server.sizes) == 1


def test_http_nan_reaches_the_stage_that_names_the_row(serve):
    server = serve(['{"scores": [1, NaN, 3]}'])
    assert math.isnan(quick(server).score(MANY[:3])[1])


def test_http_key_comes_from_the_environment_and_is_never_shown(serve, monkeypatch: pytest.MonkeyPatch):
    server = serve([403])
    monkeypatch.setenv(API_KEY_VARIABLE, "sesame")
    reward_model = quick(server)
    with pytest.raises(PleError) as caught:
        reward_model.score(MANY[:2])
    assert server.keys == ["Bearer sesame"]
    assert "sesame" not in str(caught.value) + reward_model.name + repr(vars(reward_model))


@pytest.mark.parametrize("key", ["sesame\nopen", "sésame"])
def test_http_key_that_no_header_takes_is_refused_unseen(serve, monkeypatch: pytest.MonkeyPatch, key: str):
    server = serve([])
    monkeypatch.setenv(API_KEY_VARIABLE, key)
    with pytest.raises(UsageError, match=f"the key in {API_KEY_VARIABLE}") as caught:
        quick(server).score(MANY[:2])
    assert "same" not in str(caught.value)


def test_http_key_may_end_with_a_line_break(serve, monkeypatch: pytest.MonkeyPatch):
    server = serve([])
    monkeypatch.setenv(API_KEY_VARIABLE, "sesame\n")
    quick(server).score(MANY[:2])
    assert server.keys == ["Bearer sesame"]


def test_http_secrets_in_the_url_are_not_recorded():
    with pytest.raises(UsageError, match=API_KEY_VARIABLE) as caught:
        load_reward_model("http://me:sesame@example.org/score")
    assert "sesame" not in str(caught.value)
    with_query = load_reward_model("https://example.org/score?token=sesame")
    assert "sesame" not in with_query.name
    assert with_query.name.startswith("https://example.org/score?")
    assert load_reward_model("https://example.org/score").name == "https://example.org/score"


# --- docs/rewards.md -------------------------------------------------------------------------------


def documented_file(name: str) -> str:
    """The Python example of docs/rewards.md that begins with `# name`."""
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return next(block for block in blocks if block.startswith(f"# {name}\n"))


def test_documented_function_runs(tmp_path: Path):
    file = write(tmp_path / "length_reward.py", documented_file("length_reward.py"))
    assert load_reward_model(f"{file}:score").score([("x", "one two"), ("x", "")]) == [-0.02, -10.0]


def test_documented_server_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    space = {"__name__": "reward_server"}
    exec(documented_file("reward_server.py"), space)
    server = space["make_server"](0)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        assert load_reward_model(url).score([("x", "one two")] * 40) == [-0.02] * 40
    finally:
        server.shutdown()
        server.server_close()


def test_what_a_function_prints_is_no_data(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    file = tmp_path / "loud.py"
    file.write_text("print('loaded')\ndef f(x, y):\n    print('called')\n    return [1.0 for _ in y]\n")
    assert load_reward_model(f"{file}:f").score([("x", "y")]) == [1.0]
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "loaded\ncalled\n")


def test_a_reward_model_in_another_format_is_named_by_it(reward: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    gptq = Path(shutil.copytree(reward, tmp_path / "gptq"))
    config = json.loads((gptq / "config.json").read_text())
    (gptq / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    for model, format in ((tmp_path, "GGUF"), (tmp_path / "model.gguf", "GGUF"), (gptq, "GPTQ")):
        with pytest.raises(UsageError, match=format):
            load_reward_model(str(model))
