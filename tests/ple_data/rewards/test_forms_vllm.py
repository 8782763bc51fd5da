"""The same classifiers behind a real vLLM server and in this process: the same rewards."""

import signal
from collections.abc import Callable, Iterator

import pytest

from ple_data.rewards import load_reward_model
from schemas.errors import PleError, UsageError
from schemas.options import Rewards
from tests import tiny
from tests.ple_data.rewards.test_rewards import CHAT, HH, ROWS
from tests.vllmserver import VllmServer

pytestmark = [pytest.mark.vllm, pytest.mark.long]
TEXTS = [*[row for row in ROWS if row[1] not in (tiny.EOS, tiny.PAD)], (CHAT, " No. "), (HH, "No.")]
Served = Callable[[str], tuple[str, str]]


@pytest.fixture(scope="module")
def served(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Model and address of a server that is up, by name: `chat`, one output with a chat template; `plain`, two without
    one."""
    root = tmp_path_factory.mktemp("served")
    made = {"chat": {"chat": True}, "plain": {"num_labels": 2}}
    servers: dict[str, VllmServer] = {}

    def start(name: str) -> tuple[str, str]:
        if name not in servers:
            tiny.tiny_reward(root / name, **made[name])
            words = ["--model", str(root / name), "--runner", "pooling"]
            servers[name] = VllmServer(vllm_python, root / f"{name}.log", *words)
            servers[name].start()
            servers[name].wait()
        return str(root / name), servers[name].address

    try:
        yield start
    finally:
        for server in servers.values():
            server.kill(signal.SIGTERM)


@pytest.mark.parametrize("form", ["vllm-classify", "vllm-pooling"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("chat", {}), ("chat", {"join": "text"}), ("plain", {"output_index": 0}), ("plain", {"output_index": 1})],
    ids=str,
)
def test_the_rewards_of_the_server_are_those_of_the_classifier(form, name, options, served: Served, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    model, address = served(name)
    ours = load_reward_model(model, Rewards(**options))
    theirs = load_reward_model(address, Rewards(reward_format=form, **options))
    assert theirs.runs_on == ours.runs_on
    rewards = ours.score(TEXTS)
    assert max(rewards) - min(rewards) > 0.01, "rewards that do not differ would hide a fault"
    assert theirs.score(TEXTS) == pytest.approx(rewards, abs=1e-4)


def test_what_the_server_refuses_is_one_sentence(served: Served, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    _, address = served("plain")
    with pytest.raises(UsageError, match="it gives 2 outputs"):
        load_reward_model(address, Rewards(reward_format="vllm-classify")).score(TEXTS)
    with pytest.raises(PleError, match=r"status 400 .*chat template"):
        load_reward_model(address, Rewards(reward_format="vllm-classify", join="chat", output_index=0)).score(TEXTS)
    long = [("the film was " * 3000, "good")]
    with pytest.raises(PleError, match=r"status 400 .*maximum context length"):
        load_reward_model(address, Rewards(reward_format="vllm-pooling", output_index=0)).score(long)
