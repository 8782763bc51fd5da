"""`ple` commands without the seconds that imports take: each a fork of one process that has imported everything.

    python -S -m benchmarks.paper.warm WORDS

is `ple WORDS` in a fork of the process of `server()`, or an ordinary one where there is none. The command, its files
and its numbers are the same. A command ends when the
client that asked for it, or that one's caller, is gone. Decides nothing about methods.
"""

from __future__ import annotations

import os
import socket
import sys

SOCKET = "PAPER_WARM"
"""The environment variable with the server's address."""
IMPORTED = (
    *("accelerate", "pandas", "peft", "polars", "torch", "cli", "transformers.models.llama.modeling_llama"),
    *("ple_data.engines.hf", "ple_data.evaluation.table", "ple_data.rewards.classifier", "ple_data.scoring.score"),
    *("ple_data.sampling.generate", "ple_train.train", "ple_train.baselines.responses", "ple_train.measure.evaluate"),
)
"""Beforehand; none of these may start a thread, or a fork would not be safe."""
KILLED = 137


def ask(words: list[str]) -> int:
    """The exit code of `ple WORDS`."""
    if SOCKET not in os.environ:
        os.execv(sys.executable, [sys.executable, "-m", "cli", *words])
    with socket.socket(socket.AF_UNIX) as asked:
        asked.connect(os.environ[SOCKET])
        socket.send_fds(asked, ["\0".join([os.getcwd(), *words]).encode()], [1, 2])
        asked.settimeout(1)
        caller = os.getppid()
        while os.getppid() == caller:
            try:
                return int(asked.recv(16) or KILLED)
            except TimeoutError:
                pass
    return KILLED


def serve() -> None:
    """Fork a command for each client, until the process that started this one is gone."""
    import importlib
    import socketserver
    import threading

    for name in IMPORTED:
        importlib.import_module(name)
    parent = os.getppid()

    class Command(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            import cli

            message, descriptors, *_ = socket.recv_fds(self.request, 1 << 20, 2)
            directory, *words = message.decode().split("\0")
            os.chdir(directory)
            for own, given in zip((1, 2), descriptors, strict=True):
                os.dup2(given, own)
            threading.Thread(target=self._end_with_client, daemon=True).start()
            code = 1
            try:
                cli.ple(args=words, prog_name="ple")
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            sys.stdout.flush()
            sys.stderr.flush()
            self.request.sendall(str(code).encode())

        def _end_with_client(self) -> None:
            self.request.recv(1)
            os._exit(KILLED)

    class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
        def service_actions(self) -> None:
            super().service_actions()
            if os.getppid() != parent:
                os._exit(0)

    Server(os.environ[SOCKET], Command).serve_forever()


if __name__ == "__main__":
    sys.exit(ask(sys.argv[1:]))
