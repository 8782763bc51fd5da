"""Commands of ours as real processes that start at once: the client of tests/forkserver.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


class ForkServer:
    """One command at a time, each a child of a process that has imported torch. environment: variables of all."""

    def __init__(self, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forkserver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=ENVIRONMENT | environment,
        )
        assert self._answer() == "ready"

    def run(self, argv: list[str], log: Path, **request: Any) -> tuple[int, float]:
        """Exit code (-9: killed) and seconds of one command; `log` gets what it prints. request: see the server."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"argv": argv, "log": str(log), **request}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._answer())
        return answer["exit"], answer["seconds"]

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.communicate(timeout=30)
