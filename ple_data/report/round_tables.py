"""What the report's figures show of the pairs: streamed group-by's of polars, a few numbers of each round.

The partition, tau and the means come from `ple_data.partition`; intervals, histograms and lengths are counted here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import polars as pl

from ple_data.partition import own_tau, partition, round_statistics
from ple_data.storage.store import collect

Z = 1.959963984540054
"""97.5 % quantile of the normal distribution: mean +- Z standard errors is a 95 % interval."""
MARGIN_BINS = 40
LENGTH_BINS = 8
TAILS = (0.005, 0.995)


def rounds(pairs: pl.LazyFrame, tau0: float, alpha: float) -> list[dict[str, Any]]:
    """`round_statistics` with half-widths of 95 % intervals: half_s, half_s_prompt, half_margin (None of one query).

    Pairs of one query are not independent: standard errors are those of the queries' means.
    """
    means = ["s", "s_prompt", "margin"]
    queries = (
        pairs.with_columns(partition(0.0)[0])
        .group_by("round", "query_id")
        .agg(pl.col(means).cast(pl.Float64).mean())
        .group_by("round")
        .agg([(Z * pl.col(name).std() / pl.len().sqrt()).alias(f"half_{name}") for name in means])
    )
    halves = {row["round"]: row for row in collect(queries).to_dicts()}
    return [row | halves[row["round"]] for row in round_statistics(pairs, tau0, alpha).to_dicts()]


@dataclass(frozen=True)
class Histogram:
    """Pairs by round, set and margin bin; the outer bins hold the tails too. counts[round][set][bin]."""

    edges: list[float]
    counts: dict[int, dict[str, list[int]]]


def margins(pairs: pl.LazyFrame, tau0: float, alpha: float) -> Histogram:
    """The margins of each round in equal bins between their 0.5 and 99.5 % quantiles, by set at the round's own tau."""
    frame = pairs.select("round", *partition(own_tau(pairs, tau0, alpha))[:2])
    low, high = collect(
        frame.select([pl.col("margin").quantile(q, interpolation="linear").alias(str(q)) for q in TAILS])
    ).row(0)
    width = (high - low) / MARGIN_BINS or 1.0
    place = ((pl.col("margin") - low) / width).floor().clip(0, MARGIN_BINS - 1).cast(pl.Int64).alias("bin")
    counts: dict[int, dict[str, list[int]]] = {}
    for t, kind, bin, rows in collect(frame.group_by("round", "set", place).agg(pl.len())).sort("round").iter_rows():
        counts.setdefault(t, {"rank": [0] * MARGIN_BINS, "wsft": [0] * MARGIN_BINS})[kind][bin] = rows
    return Histogram([low + width * bin for bin in range(MARGIN_BINS + 1)], counts)


def rewards_by_length(pairs: pl.LazyFrame, round: int) -> dict[str, list[dict[str, float]]]:
    """By arm, the mean reward of a round's responses in bins of about equal count of their length in tokens: length
    (mean), mean, half (of a 95 % interval; 0 of one query), rows. The round has pairs.

    Responses to one query are not independent: the standard error sums their residuals by query first.
    """
    result = {}
    for arm, reward in (("y", "s"), ("y_prompt", "s_prompt")):
        frame = pairs.filter(pl.col("round") == round).select(
            "query_id",
            pl.col(f"{arm}_ids").list.len().cast(pl.Float64).alias("length"),
            pl.col(reward).cast(pl.Float64).alias("mean"),
        )
        cuts = [pl.col("length").quantile(q / LENGTH_BINS).alias(str(q)) for q in range(1, LENGTH_BINS)]
        edges = sorted(set(collect(frame.select(cuts)).row(0)))
        place = pl.sum_horizontal([(pl.col("length") > edge).cast(pl.Int32) for edge in edges])
        by_query = frame.group_by(place.alias("bin"), "query_id").agg(
            pl.col("length", "mean").sum(), pl.len().cast(pl.Int64).alias("rows")
        )
        rows, queries = pl.col("rows").sum(), pl.len()
        residual = pl.col("mean") - pl.col("rows") * pl.col("mean").sum() / rows
        variance = pl.when(queries > 1).then(residual.pow(2).sum() * queries / (queries - 1)).otherwise(0.0)
        found = by_query.group_by("bin").agg(
            pl.col("length", "mean").sum() / rows, (Z * variance.sqrt() / rows).alias("half"), rows
        )
        result[arm] = collect(found).sort("bin").drop("bin").to_dicts()
    return result


def wilson(part: int, whole: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    share, square = part / whole, Z * Z
    middle = (share + square / (2 * whole)) / (1 + square / whole)
    half = Z / (1 + square / whole) * math.sqrt(share * (1 - share) / whole + square / (4 * whole * whole))
    return middle - half, middle + half
