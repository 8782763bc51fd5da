"""Runs commands of ours as real processes that start at once: children forked from one that has imported torch.

    python -m tests.forkserver

A line of JSON on stdin starts one command: {"argv": [...], "log": FILE, "cwd": DIR} and, to kill it with -9, either
"kill_after": SECONDS or "kill_at": N and "watch": DIR, which is just before the N-th change under DIR (a file opened
for writing, linked, renamed, removed, a directory made). "fault": [N, KIND, ERRNO] is for a server that has
tests/faults/shim.c preloaded; "first" is Python that the child runs before the command. When it has ended, a line of
JSON on stdout says so: {"exit": CODE, "seconds": S}; -9 is killed, 124 took more than "limit" seconds. The log gets its
output, a line `unit ID` for each unit that it samples and, at the end, `changes N`.

The server never runs torch itself: a fork is safe only while there are no threads.
"""

import ctypes
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

CHANGES = {"os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def serve() -> None:
    import_everything()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            run(request)
        kill_after = request.get("kill_after")
        if kill_after is not None and not ended_within(child, kill_after):
            os.kill(child, signal.SIGKILL)
        limit = request.get("limit")
        late = limit is not None and not ended_within(child, limit)
        if late:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        code = 124 if late else os.waitstatus_to_exitcode(status)
        answer = {"exit": code, "seconds": time.monotonic() - began}
        print(json.dumps(answer), flush=True)


def ended_within(child: int, seconds: float) -> bool:
    ended = os.pidfd_open(child)
    try:
        return bool(select.select([ended], [], [], seconds)[0])
    finally:
        os.close(ended)


def import_everything() -> None:
    """Import what the commands need and what transformers imports late. Nothing here may start a thread."""
    import accelerate  # noqa: F401
    import pandas  # noqa: F401
    import peft  # noqa: F401
    import polars  # noqa: F401
    import torch  # noqa: F401
    from transformers import (  # noqa: F401
        AutoTokenizer,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    import cli  # noqa: F401
    from ple_data.engines import hf  # noqa: F401
    from ple_data.evaluation import table  # noqa: F401
    from ple_data.judge import judge  # noqa: F401
    from ple_data.report import page  # noqa: F401
    from ple_data.rewards import classifier  # noqa: F401
    from ple_data.scoring import score  # noqa: F401
    from ple_train import reward, sft, train  # noqa: F401
    from ple_train.baselines import responses  # noqa: F401
    from ple_train.measure import evaluate, purity  # noqa: F401


def run(request: dict[str, Any]) -> None:
    """In the child: be the command, with its output in the log, and end. Never returns."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(request.get("cwd", "."))
    if "fault" in request:
        counted = arm(request["watch"], *request["fault"])
    else:
        counted = count_changes(request.get("watch", request["log"]), request.get("kill_at"))
        log_sampled_units(log)
    code = 70
    try:
        exec(request.get("first", ""), {})
        import cli

        cli.ple(args=request["argv"], prog_name="ple")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(log, f"\n{counted()}\n".encode())
        os._exit(code)


def arm(watch: str, n: int, kind: int, error: int) -> Callable[[], str]:
    """Let the n-th file operation under `watch` meet a fault, by the library that is preloaded."""
    shim = ctypes.CDLL(None)
    shim.fault_count.restype, shim.fault_last.restype = ctypes.c_long, ctypes.c_char_p
    shim.fault_arm(watch.encode(), ctypes.c_long(n), kind, error)
    return lambda: f"operations {shim.fault_count()} {shim.fault_last().decode()}"


def count_changes(watch: str, kill_at: int | None) -> Callable[[], str]:
    """Count the file-system changes under `watch`; die by SIGKILL just before the one numbered `kill_at`."""
    seen = [0]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & WRITING
        if (writes or event in CHANGES) and any(str(arg).startswith(watch) for arg in args[:2]):
            seen[0] += 1
            if seen[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: f"changes {seen[0]}"


def log_sampled_units(log: int) -> None:
    """Write down which units the engine is asked for, so that a test can say that none is sampled twice."""
    from ple_data.engines.hf import HfEngine

    sample = HfEngine.sample

    def logged(units: Any) -> Any:
        for unit in units:
            if unit[0].key:  # else the engine tries itself
                os.write(log, f"unit {unit[0].key[0]}\n".encode())
            yield unit

    HfEngine.sample = lambda self, units, sampling: sample(self, logged(units), sampling)  # type: ignore[method-assign]


if __name__ == "__main__":
    serve()
