"""Quantiles of a column by round in bounded memory, however many rows there are. Reads no file."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import polars as pl

from ple_data.storage.store import collect

EXACT = 10_000_000
"""Rows up to which every value is kept in memory (8 bytes each)."""
_SIGN, _HALF = np.uint32(2**31), 16


def quantiles_by_round(
    rows: pl.LazyFrame, column: str, wanted: Mapping[str, float], counts: Mapping[int, int]
) -> pl.DataFrame:
    """`round`, and the quantiles of `column` (finite numbers) under their names, linear between neighbours.

    counts: rows by round. Exact up to `EXACT` rows; beyond, values are rounded to float32 first (a relative error of
    6e-8 at most), and two passes over them count those of each half of its bits.
    """
    if sum(counts.values()) <= EXACT:
        found = [pl.col(column).quantile(q, interpolation="linear").alias(name) for name, q in wanted.items()]
        return collect(rows.select("round", column).group_by("round").agg(found))
    keys = rows.select("round", _in_order(column).alias("key"))
    high = (pl.col("key") // 2**_HALF).alias("high")
    coarse = collect(keys.group_by("round", high).agg(pl.len())).sort("round", "high")
    ranks = {t: sorted({rank for q in wanted.values() for rank in _neighbours(q, n)}) for t, n in counts.items()}
    places = pl.concat([_place(coarse, t, ranks[t]) for t in counts])
    halves = places.select("round", "high").unique()
    among = keys.with_columns(high).join(halves.lazy(), on=["round", "high"], how="semi")
    fine = collect(among.group_by("round", "high", "key").agg(pl.len())).sort("round", "key")
    values = {}
    for t, high_key, rank, before in places.iter_rows():
        own = fine.filter((pl.col("round") == t) & (pl.col("high") == high_key))
        at = int(np.searchsorted(own["len"].cum_sum().to_numpy(), rank - before, side="right"))
        values[t, rank] = _value(own["key"][at])
    lines = []
    for t, n in counts.items():
        line: dict[str, float] = {"round": t}
        for name, q in wanted.items():
            (low, up), place = _neighbours(q, n), q * (n - 1)
            line[name] = values[t, low] + (values[t, up] - values[t, low]) * (place - low)
        lines.append(line)
    return pl.DataFrame(lines, schema_overrides={"round": rows.collect_schema()["round"]})


def _neighbours(q: float, n: int) -> tuple[int, int]:
    return math.floor(q * (n - 1)), math.ceil(q * (n - 1))


def _place(coarse: pl.DataFrame, t: int, ranks: list[int]) -> pl.DataFrame:
    """For each rank the half of the bits that its value has, and how many values lie before that half."""
    own = coarse.filter(pl.col("round") == t)
    ends = own["len"].cum_sum().to_numpy()
    at = np.searchsorted(ends, ranks, side="right")
    before = ends[at] - own["len"].to_numpy()[at]
    return pl.DataFrame({"round": own["round"][at], "high": own["high"][at], "rank": ranks, "before": before})


def _in_order(column: str) -> pl.Expr:
    """A float32 as an integer of 32 bits that has its place in the order."""

    def keys(values: pl.Series) -> pl.Series:
        bits = np.ascontiguousarray(values.to_numpy()).view(np.uint32)
        return pl.Series(np.where(bits & _SIGN, ~bits, bits | _SIGN))

    zero_is_one = pl.col(column).cast(pl.Float32) + pl.lit(0.0, pl.Float32)  # - 0.0 becomes 0.0
    return zero_is_one.map_batches(keys, return_dtype=pl.UInt32, is_elementwise=True)


def _value(key: int) -> float:
    bits = np.uint32(key)
    return float((bits ^ _SIGN if bits & _SIGN else ~bits).view(np.float32))
