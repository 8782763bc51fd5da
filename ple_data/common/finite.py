"""The refusal of numbers that are NaN or infinite, before they are kept. Computes none."""

import math
from collections.abc import Iterable

from schemas.errors import PleError

NAMED_ROWS = 10
"""How many refused rows an error lists."""


def refuse_non_finite(what: str, values: Iterable[tuple[str, float]], advice: str) -> None:
    """Raise PleError `what: place = value; ...; advice` for (place, value) whose value is NaN or infinite."""
    bad = [f"{place} = {value}" for place, value in values if not math.isfinite(value)]
    if bad:
        more = f" and {len(bad) - NAMED_ROWS} more" if len(bad) > NAMED_ROWS else ""
        raise PleError(f"{what}: {'; '.join(bad[:NAMED_ROWS])}{more}; {advice}")
