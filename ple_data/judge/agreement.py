"""What several annotators say together: majority and Fleiss' kappa. Reads no file."""

from collections import Counter
from collections.abc import Sequence

from ple_data.judge.results import Outcome


def majority(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome that more annotators chose than any other; a tie where there is none."""
    ranked = Counter(outcomes).most_common(2)
    return ranked[0][0] if len(ranked) == 1 or ranked[0][1] > ranked[1][1] else "tie"


def fleiss_kappa(counts: Sequence[Sequence[int]]) -> float | None:
    """Fleiss' kappa (Fleiss 1971) of N subjects, each rated by the same n >= 2 raters.

    counts: for each subject the number of raters by category. None where it is not defined: no subject, a single
    rater, or all ratings in one category. Raises ValueError where subjects have different numbers of ratings.
    """
    if len({sum(row) for row in counts}) > 1:
        raise ValueError("every subject needs the same number of ratings")
    raters = sum(counts[0]) if counts else 0
    if raters < 2:
        return None
    total = raters * len(counts)
    agreement = sum(sum(n * (n - 1) for n in row) for row in counts) / (total * (raters - 1))
    chance = sum((sum(column) / total) ** 2 for column in zip(*counts, strict=True))
    return None if chance == 1 else (agreement - chance) / (1 - chance)
