"""Many small objects at once without Python's search for cycles, which goes through all that is there every time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """While this is entered, and of whatever makes no cycles. May decorate a function; not one that yields."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
