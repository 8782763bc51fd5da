"""A real vLLM server on this machine's CPU, that can be killed and started again at its address."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

START = 500
"""Seconds that it may take to start."""


class VllmServer:
    """`words`: options of `vllm serve`. `address` is the same at every start."""

    def __init__(self, python: str, log: Path, *words: str, **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address, self._log = f"http://127.0.0.1:{port}", log
        served = ["-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
        self._words = [python, *served, "--enforce-eager", "--dtype", "float32", *words]
        quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        self._environment = {**os.environ, **quiet, **environment}
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._words, stdout=output, stderr=output, env=self._environment, start_new_session=True
            )

    def wait(self) -> None:
        assert self._process is not None
        until = time.monotonic() + START
        while time.monotonic() < until:
            assert self._process.poll() is None, self._log.read_text(errors="replace")[-3000:]
            try:
                if httpx.get(f"{self.address}/health", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        pytest.fail(f"the server did not start in {START} s: {self._log.read_text(errors='replace')[-3000:]}")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End it and its workers; SIGTERM lets it end in peace."""
        if self._process is None:
            return
        os.killpg(self._process.pid, number)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None
