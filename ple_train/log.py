"""Messages of the trainer: one line on stderr, because stdout is for data; the first process alone speaks."""

import os
import sys


def is_first_process() -> bool:
    """Whether this is the first of several training processes, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def print_to_log(line: str) -> None:
    """One line on stderr, in the first of several training processes."""
    if is_first_process():
        print(line, file=sys.stderr, flush=True)
