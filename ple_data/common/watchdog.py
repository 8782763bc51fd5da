"""Ends every process of an engine once its owner is gone, however it went: also after kill -9. Linux only.

The owner puts a token into the environment that the engine's processes inherit and holds a pipe to this script.
When the pipe closes, this script kills every process that carries the token. It runs by itself, on the standard
library alone: `python watchdog.py TOKEN`, with the pipe as its standard input.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

TOKEN_NAME = "PLE_ENGINE_OWNER"
_QUIET_SCANS = 3
"""Scans in a row that must find nothing: a process may be starting another one while it is looked for."""
_SCAN_SECONDS = 0.1


class Watchdog:
    """Start it before the engine, stop it after the engine was shut down."""

    def __init__(self) -> None:
        token = uuid.uuid4().hex
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, token],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name != TOKEN_NAME},
            start_new_session=True,  # Ctrl-C is for the owner
        )
        os.environ[TOKEN_NAME] = token
        os.environ["SPT_NOENV"] = "1"  # a process that renames itself must not overwrite its environment

    def stop(self) -> None:
        """Kill what the engine has left, and end. May be called twice."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            os.environ.pop(TOKEN_NAME, None)
            self._process.stdin.close()
            self._process.wait()


def _carriers(mark: bytes) -> list[int]:
    """Processes with the token in their environment, but for the one that frees shared memory and ends by itself."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                marked = mark in (entry / "environ").read_bytes()
                if marked and b"resource_tracker" not in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # it has ended, or is another user's
    return found


def _main(token: str) -> None:
    sys.stdin.buffer.read()  # returns when the owner closes the pipe or dies
    mark = f"{TOKEN_NAME}={token}".encode()
    quiet = 0
    while quiet < _QUIET_SCANS:
        carriers = _carriers(mark)
        for pid in carriers:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        quiet = 0 if carriers else quiet + 1
        time.sleep(_SCAN_SECONDS)


if __name__ == "__main__":
    _main(sys.argv[1])
