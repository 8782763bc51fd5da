"""Runs a command so that neither it nor its workers outlive the caller, even one that was killed with -9.

The caller starts this file as a small launcher in a session of its own and holds the writing end of its stdin. When
that end closes, because the caller is interrupted or dead, the launcher ends the command.
"""

import contextlib
import os
import select
import signal
import sys
from collections.abc import Sequence
from subprocess import DEVNULL, PIPE, Popen
from typing import NamedTuple

GRACE_SECONDS = 45.0  # torchrun gives its workers 30 s


class Ended(NamedTuple):
    """How a command ended: its exit code (128 + N when signal N ended it) and the most memory, in bytes, that the
    largest of its processes held; 0 where nobody knows."""

    code: int
    memory: int


def run_child(command: Sequence[str], keep_open: Sequence[int] = ()) -> Ended:
    """Run the command to its end, its stdout sent to our stderr; when this raises, nothing of it is left.

    `keep_open` are file descriptors, such as a held lock, that stay open until the last of the command's processes is
    gone, whatever happens to the caller.
    """
    words = [sys.executable, "-P", __file__, *command]
    launcher = Popen(words, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True, pass_fds=tuple(keep_open))
    try:
        launcher.wait()
    finally:
        answer, _ = launcher.communicate()
    return Ended(*map(int, answer.split())) if answer else Ended(128 + signal.SIGKILL, 0)  # it was killed itself


# The launcher


def _launch(command: Sequence[str]) -> Ended:
    """How the command ended; ends it when the caller lets go."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # signals are for the command; a handler is not inherited
    process = Popen(command, stdin=DEVNULL, stdout=2, process_group=0, close_fds=False)  # it holds the lock too
    ended = os.pidfd_open(process.pid)
    waiting = select.poll()
    waiting.register(ended, select.POLLIN)
    waiting.register(0, select.POLLIN)
    if ended not in (descriptor for descriptor, _ in waiting.poll()):
        waiting.unregister(0)
        _end_group(process.pid, signal.SIGTERM)
        waiting.poll(1000 * GRACE_SECONDS)
        _end_group(process.pid, signal.SIGKILL)
    _, status, usage = os.wait4(process.pid, 0)
    _end_group(process.pid, signal.SIGKILL)  # a worker that its command left behind
    code = os.waitstatus_to_exitcode(status)
    return Ended(code if code >= 0 else 128 - code, usage.ru_maxrss * 1024)


def _end_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the caller is dead
        os.write(1, b"%d %d\n" % _launch(sys.argv[1:]))
