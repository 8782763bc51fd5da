"""Runs one command so that neither it nor its workers outlive the caller, even one that was killed with -9.

The caller starts this file as a small launcher in a session of its own and holds the writing end of its stdin. When
that end closes, because the caller is done, interrupted or dead, the launcher ends the whole process group. It uses
the standard library only and never looks at what the command does.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

GRACE_SECONDS = 45.0  # torchrun gives its workers 30 s


def run_child(command: Sequence[str], keep_open: Sequence[int] = ()) -> int:
    """The command's exit code (128 + N when signal N ended it), its stdout sent to our stderr.

    `keep_open` are file descriptors, such as a held lock, that stay open until the last of the command's processes is
    gone, whatever happens to the caller.
    """
    launcher = subprocess.Popen(
        [sys.executable, "-I", __file__, *command],
        stdin=subprocess.PIPE,
        stdout=2,
        start_new_session=True,
        pass_fds=tuple(keep_open),
    )
    assert launcher.stdin is not None
    try:
        return launcher.wait()
    finally:
        launcher.stdin.close()
        launcher.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(launcher.pid, signal.SIGKILL)  # a worker that its command left behind


def _launch(command: Sequence[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # the group's signals are for the command; a handler is not inherited
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    abandoned = threading.Event()

    def end_group_when_abandoned() -> None:
        os.read(0, 1)  # returns when the caller closes its end, or dies
        abandoned.set()
        os.killpg(0, signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end_group_when_abandoned, daemon=True).start()
    code = child.wait()
    if abandoned.is_set():
        os.killpg(0, signal.SIGKILL)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(_launch(sys.argv[1:]))
