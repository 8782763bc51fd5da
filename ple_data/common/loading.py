"""While a library loads somebody's files: whatever it raises is one sentence about them. Loads nothing itself.

Libraries raise anything for a file that is not as they expect: TypeError, AttributeError, RuntimeError, a panic.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from schemas.errors import PleError, UsageError, first_line

_SIZES, _LAYERS = "size|dim|embd|d_model|d_ff|heads|vocab", "layers?$|depth$|blocks?$"
_MOST = {"position|seq_len|n_ctx": 10**8, _SIZES: 10**7, "labels": 10**5, "expert": 10**4, _LAYERS: 1000}
"""What a model's configuration may ask for, by its name: building more would take minutes or all memory."""
UNREACHED = "no folder of this name is here, and the hub cannot be reached: check the name, or connect"
DAMAGED = "check that its files are whole and of a kind that transformers reads, or save it again"


@contextmanager
def loading(what: str, advice: str = DAMAGED) -> Iterator[None]:
    """Turn what a library raises meanwhile into `cannot load WHAT: …; ADVICE`. Its own reports are not shown.

    Our own errors, and too little memory, pass as they are. Raises UsageError.
    """
    with ExitStack() as stack:
        if "transformers" in sys.modules:
            from transformers.utils import logging

            stack.callback(logging.set_verbosity, logging.get_verbosity())
            logging.set_verbosity_error()
        try:
            yield
        except (PleError, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            if is_out_of_memory(error):
                raise
            kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
            if advice == DAMAGED and "couldn't connect to" in str(error):
                advice = UNREACHED
            raise UsageError(f"cannot load {what}: {kind}{first_line(error).rstrip('.')}; {advice}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Torch has an exception of its own for a GPU, and a plain RuntimeError for a CPU."""
    if type(error) is RuntimeError:
        return "DefaultCPUAllocator: can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def check_sizes(config: dict[str, Any], where: str) -> None:
    """Refuse a configuration of more layers, experts or of larger sizes than any model has. Raises UsageError."""
    parts = [config]
    for part in parts:  # which grows meanwhile
        parts += [value for value in part.values() if isinstance(value, dict)]
        for name, value in part.items():
            most = next((most for pattern, most in _MOST.items() if re.search(pattern, name)), None)
            if most is not None and type(value) in (int, float) and value > most:
                raise UsageError(f"{where}: {name} is more than {most}, which no model has: correct it")
