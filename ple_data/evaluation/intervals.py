"""95 % intervals over queries: the percentile bootstrap, and the jackknife where a bootstrap misleads.

Queries are what is drawn: all samples of a query stay together. Two policies are compared by the interval of their
difference on the same draws. Knows nothing of models or files.
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from schemas.reports import Estimate

CONFIDENCE = 0.95
RESAMPLES = 2000
_NUMBERS_AT_ONCE = 1 << 21
"""Values that one batch of resamples may hold: 16 MiB."""

Statistic = Callable[[np.ndarray], np.ndarray]
"""A statistic of many draws at once: places of the drawn queries [draws, queries] -> [draws]."""


def bootstrap(statistic: Statistic, queries: int, *, seed: int = 0) -> Estimate:
    """The statistic over all queries, and its percentile bootstrap interval (Efron 1979) from 2,000 draws.

    One query has no interval: both ends are the value. The draws are those of `scipy.stats.bootstrap` with the same
    generator, which the tests compare; scipy itself is 140 MiB.
    """
    value = float(statistic(np.arange(queries)[None])[0])
    if queries == 1:
        return Estimate(mean=value, low=value, high=value, count=1)
    generator = np.random.default_rng(seed)
    at_once = max(1, _NUMBERS_AT_ONCE // queries)
    sizes = [min(at_once, RESAMPLES - done) for done in range(0, RESAMPLES, at_once)]
    drawn = np.concatenate([statistic(generator.integers(0, queries, (size, queries))) for size in sizes])
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(mean=value, low=float(low), high=float(high), count=queries)


def bootstrap_mean(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """The mean of one value a query, and its interval."""
    array = np.asarray(values, dtype=np.float64)
    return bootstrap(lambda places: array[places].mean(axis=-1), len(array), seed=seed)


def jackknife(value: float, without: np.ndarray) -> Estimate:
    """A statistic and its interval of 1.96 standard errors from its values without each query (Efron and Stein 1981).

    For counts of distinct things: a bootstrap draw repeats queries, so it always has fewer of them than the data, and
    its percentiles lie wholly below the value.
    """
    count = len(without)
    error = float(np.sqrt((count - 1) / count * np.square(without - without.mean()).sum()))
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error
    return Estimate(mean=value, low=value - half, high=value + half, count=count)
