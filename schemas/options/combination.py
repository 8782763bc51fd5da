"""How several rewards become one: `--combine` and `--normalize-rewards`, read. Computes no reward."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from schemas.errors import UsageError

RULES = "mean, min, weighted:W1,W2,... or lexicographic[:TOLERANCE]"


@dataclass(frozen=True)
class Combination:
    """rule: mean, min, weighted, lexicographic, or nothing of one normalized reward. weights: of weighted, one a
    reward. normalized: by round, before they are put together.
    """

    rule: str
    weights: tuple[float, ...] = ()
    tolerance: float = 0.0
    normalized: bool = False

    def name(self, models: Sequence[str]) -> str:
        """What is recorded as the reward model: of `weighted:1,0.5` of A and B, `weighted:1,0.5(A, B)`."""
        numbers = self.weights or ((self.tolerance,) if self.rule == "lexicographic" else ())
        rule = self.rule + ":" * bool(numbers) + ",".join(repr(number).removesuffix(".0") for number in numbers)
        return ("normalized " * self.normalized + rule).strip() + f"({', '.join(models)})"


def of_pairs(name: str) -> bool:
    """Whether a recorded reward model's rewards are of a pair together, and not of a response by itself."""
    return name.removeprefix("normalized ").startswith("lexicographic:") and name.endswith(")")


def combination(text: str, models: int, normalized: bool) -> Combination | None:
    """How so many rewards are put together; None where there is one, which is taken as it is. Raises UsageError."""
    rule, _, rest = text.partition(":")
    if rule not in ("mean", "min", "weighted", "lexicographic") or (rest and rule in ("mean", "min")):
        raise UsageError(f"--combine must be {RULES}, not {text}")
    if models < 2 and text != "mean":
        raise UsageError(f"--combine {text} puts several rewards together: give --reward-model for each")
    if rule == "weighted":
        weights = _numbers(text, rest)
        if len(weights) != models or not any(weights):
            raise UsageError(f"--combine {text}: give a weight for each of the {models} rewards, not all of them 0")
        return Combination(rule, weights, normalized=normalized)
    if rule == "lexicographic":
        (tolerance,) = _numbers(text, rest or "0", most=1)
        if tolerance < 0:
            raise UsageError(f"--combine {text}: the tolerance is at least 0")
        return Combination(rule, tolerance=tolerance, normalized=normalized)
    if models > 1:
        return Combination(rule, normalized=normalized)
    return Combination("", normalized=True) if models and normalized else None


def _numbers(text: str, listed: str, most: int = 100) -> tuple[float, ...]:
    try:
        found = tuple(map(float, listed.split(",")))
    except ValueError:
        found = ()
    if not found or len(found) > most or not all(map(math.isfinite, found)):
        raise UsageError(f"--combine {text}: {listed or 'nothing'} is not what it takes: {RULES}")
    return found
