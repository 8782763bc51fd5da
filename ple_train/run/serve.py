"""A model server that a run starts when it first samples, and ends with itself. Knows nothing of what is asked of it.

It is asked for an answer until it gives one, sent to sleep while nothing samples where the recipe says so, and started
again, at the same address, where it has ended. Its own messages go into RUN/server.log.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

from ple_data.common.command import say
from ple_train.run import child
from schemas.errors import PleError, UsageError
from schemas.recipe import GenServer

START_SECONDS = 3600.0
"""How long a server may take to load its model."""
POLL_SECONDS = 0.5
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
"""No proxy stands before a server of this machine."""
SWITCHES = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_SERVER_DEV_MODE": "1"}
"""What vLLM wants in its environment to load adapters, and to sleep."""


class Server:
    """Use as a context manager. `model` takes the place of {model} in the command."""

    def __init__(self, how: GenServer, model: str, log: Path) -> None:
        self._how, self._model, self._log = how, model, log
        self._process: Popen[bytes] | None = None
        self._address, self._asleep, self._ready = "", False, False

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def address(self) -> str:
        """Where it answers: it is started, or woken up, if need be. Raises PleError where it does not start."""
        if not self._runs():
            self._start()
        if not self._ready:
            self._wait()
        elif self._asleep:
            self._tell("wake_up")
            self._asleep = False
        return self._address

    @contextmanager
    def watched(self) -> Iterator[str]:
        """Its `address`; if it ends meanwhile it is started again there, and whoever asks it goes on asking."""
        address, over = self.address(), threading.Event()

        def watch() -> None:
            while not over.wait(POLL_SECONDS):
                if self._runs():
                    self._ready = self._ready or self._answers("health")
                elif self._ready:
                    say(f"the server ended; {self._log} says why: {self._last_words()}")
                    self._start()
                else:
                    say(self._unready())
                    return

        watcher = threading.Thread(target=watch, name="server")
        watcher.start()
        try:
            yield address
        finally:
            over.set()
            watcher.join()

    def rest(self) -> None:
        """Let it sleep, where it is up and the recipe says so. Raises PleError where it does not."""
        if self._how.sleep and not self._asleep and self._ready and self._runs():
            self._tell("sleep?level=1")
            self._asleep = True

    def _runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _start(self) -> None:
        self._end()
        if not self._address:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self._asleep = self._ready = False
        words = [word.replace("{model}", self._model) for word in self._how.command]
        words += ["--host", "127.0.0.1", "--port", self._address.rpartition(":")[2]]
        launcher = [sys.executable, "-P", child.__file__, *words]
        switches = {name: value for name, value in SWITCHES.items() if name not in os.environ}
        with self._log.open("ab") as log:
            self._process = Popen(
                launcher, stdin=PIPE, stdout=DEVNULL, stderr=log, env=os.environ | switches, start_new_session=True
            )
        say(f"starting the server at {self._address} ({self._log} has its messages)")

    def _wait(self) -> None:
        began = time.monotonic()
        while not self._answers("health"):
            if not self._runs():
                raise PleError(self._unready())
            if time.monotonic() - began > START_SECONDS:
                raise PleError(f"the server was not ready in {START_SECONDS:.0f} s; see {self._log}")
            time.sleep(POLL_SECONDS)
        self._ready = True
        say(f"the server is ready after {time.monotonic() - began:.0f} s")

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()  # the launcher ends it
            process.wait()

    def _tell(self, what: str) -> None:
        try:
            _open(urllib.request.Request(f"{self._address}/{what}", method="POST"), timeout=600).close()
        except (urllib.error.URLError, OSError) as error:
            raise UsageError(
                f"the server does not {what.partition('?')[0]} ({error}): start it with --enable-sleep-mode, or leave "
                "out gen.server.sleep"
            ) from error

    def _answers(self, path: str) -> bool:
        try:
            with _open(f"{self._address}/{path}", timeout=10) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _unready(self) -> str:
        return f"the server ended before it was ready; {self._log} says why: {self._last_words()}"

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return next((line.strip()[-300:] for line in reversed(lines) if line.strip()), "nothing")
