"""Quantiles in bounded memory: those of numpy, to the rounding that is promised."""

import numpy as np
import polars as pl
import pytest

from ple_data.storage import quantiles
from ple_data.storage.quantiles import quantiles_by_round

WANTED = {"q0": 0.0, "q05": 0.05, "q5": 0.5, "q95": 0.95, "q1": 1.0}


def values(kind: str, n: int) -> np.ndarray:
    numbers = np.random.default_rng(n)
    return {
        "normal": numbers.normal(0, 2, n),
        "far": numbers.standard_cauchy(n) * 10.0 ** numbers.integers(-30, 30, n),
        "ties": numbers.integers(-2, 3, n).astype(float),
        "zeros": np.where(numbers.random(n) < 0.5, -0.0, 0.0),
        "one": np.full(n, 0.1),
    }[kind]


@pytest.mark.parametrize("kind", ["normal", "far", "ties", "zeros", "one"])
@pytest.mark.parametrize("most", [0, 10**6])
def test_they_are_those_of_numpy(kind, most, monkeypatch):
    monkeypatch.setattr(quantiles, "EXACT", most)
    rounds = {0: values(kind, 10_001), 3: values(kind, 2), 5: values(kind, 1)}
    rows = pl.concat([pl.DataFrame({"round": t, "margin": of}) for t, of in rounds.items()]).sample(
        fraction=1.0, shuffle=True, seed=0
    )
    found = quantiles_by_round(rows.lazy(), "margin", WANTED, {t: len(of) for t, of in rounds.items()}).sort("round")
    assert found.columns == ["round", *WANTED]
    assert found["round"].to_list() == [0, 3, 5]
    for t, line in zip(rounds, found.drop("round").rows(), strict=True):
        of = rounds[t] if most else rounds[t].astype(np.float32).astype(np.float64)
        expected = np.quantile(of, list(WANTED.values()))
        np.testing.assert_allclose(line, expected, rtol=1e-12, atol=1e-12 * np.abs(of).max())
        np.testing.assert_allclose(
            line, np.quantile(rounds[t], list(WANTED.values())), rtol=1e-6, atol=1e-7 * np.abs(of).max()
        )
