"""Messages of the trainer: one line on stderr, because stdout is for data; the first process alone speaks."""

import os
import sys


def print_to_log(line: str) -> None:
    """One line on stderr, in the first of several training processes."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
