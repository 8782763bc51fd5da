"""Runs commands so that neither they nor their workers outlive the caller, even one that was killed with -9.

The caller starts this file as a small launcher in a session of its own and holds the writing end of its stdin. When
that end closes, because the caller is done, interrupted or dead, the launcher ends the command that is running.

A `ple` command of this very environment is not started anew, which is mostly the imports of torch and transformers
(seconds): the launcher imports them once and forks. It never computes, and what it imports starts no threads but those
of OpenBLAS, which knows forks. Where an import has opened a GPU, which no fork may inherit, the command starts anew
after all; so does `ple-gen` where vLLM is installed, which wants to set up its process by itself.
"""

import contextlib
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, NoReturn, Self

GRACE_SECONDS = 45.0  # torchrun gives its workers 30 s
PROGRAMS = ("ple", "ple-gen", "ple-score", "ple-train")
_GPU_DEVICES = ("/dev/nvidia", "/dev/kfd")


class Ended(NamedTuple):
    """How a command ended: its exit code (128 + N when signal N ended it) and the most memory, in bytes, that the
    largest of its processes held; 0 where nobody knows, as of one that was started anew and held less than the
    launcher, whose peak it inherits."""

    code: int
    memory: int


class Launcher:
    """Runs one command after another. A context manager: at its end nothing that it started is left.

    `keep_open` are file descriptors, such as a held lock, that stay open until the last of the commands' processes is
    gone, whatever happens to the caller.
    """

    def __init__(self, keep_open: Sequence[int] = ()) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            pass_fds=tuple(keep_open),
        )

    def run(self, command: Sequence[str]) -> Ended:
        """Run the command to its end, its stdout sent to our stderr."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(list(command)) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        return Ended(*map(int, answer.split())) if answer else Ended(128 + signal.SIGKILL, 0)  # it was killed itself

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


def run_child(command: Sequence[str]) -> int:
    """The exit code of one command, by a launcher of its own."""
    with Launcher() as launcher:
        return launcher.run(command).code


# The launcher


def _serve() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # signals are for the command; a handler is not inherited
    while line := sys.stdin.readline():
        command = json.loads(line)
        forked = _may_fork(command) and _warm_up()
        ended = _wait(_fork(command) if forked else _spawn(command))
        if not forked and ended.memory <= _own_peak():
            ended = ended._replace(memory=0)
        with contextlib.suppress(BrokenPipeError):  # the caller is dead
            os.write(1, b"%d %d\n" % ended)


def _may_fork(command: Sequence[str]) -> bool:
    program = Path(shutil.which(command[0]) or "").absolute()
    if program.name not in PROGRAMS or program.parent != Path(sys.executable).parent:
        return False
    samples = program.name == "ple-gen" or command[1:2] == ["gen"]
    return not (samples and importlib.util.find_spec("vllm"))


def _warm_up() -> bool:
    """Import what takes long; whether a fork may go on from here."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else looking for a GPU would open it
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers

    for name in ("AutoTokenizer", "LlamaForCausalLM", "LlamaForSequenceClassification"):
        getattr(transformers, name)  # transformers imports late
    return not any(path.startswith(_GPU_DEVICES) for path in _open_files())


def _own_peak() -> int:
    """The most memory that this program has held, in bytes; what its process held before it was this one left out."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def _open_files() -> list[str]:
    paths = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            paths.append(os.readlink(entry))
    return paths


def _spawn(command: Sequence[str]) -> int:
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, process_group=0).pid


def _fork(command: Sequence[str]) -> int:
    """The pid of a child that is the command. The child never returns: it leaves by way of SystemExit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of OpenBLAS's threads
        pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        _become(command)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(pid, pid)  # whichever of the two comes first
    return pid


def _become(command: Sequence[str]) -> NoReturn:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.argv = list(command)
    [script] = entry_points(group="console_scripts", name=Path(command[0]).name)
    sys.exit(script.load()())


def _wait(pid: int) -> Ended:
    """How the command ended; ends it, and the launcher, when the caller lets go."""
    ended = os.pidfd_open(pid)
    waiting = select.poll()
    waiting.register(ended, select.POLLIN)
    waiting.register(0, select.POLLIN)
    ready = [descriptor for descriptor, _ in waiting.poll()]
    if ended not in ready:
        waiting.unregister(0)
        _end_group(pid, signal.SIGTERM)
        waiting.poll(1000 * GRACE_SECONDS)
        _end_group(pid, signal.SIGKILL)
    os.close(ended)
    _, status, usage = os.wait4(pid, 0)
    _end_group(pid, signal.SIGKILL)  # a worker that its command left behind
    code = os.waitstatus_to_exitcode(status)
    return Ended(code if code >= 0 else 128 - code, usage.ru_maxrss * 1024)


def _end_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


if __name__ == "__main__":
    _serve()
