"""The section on training: loss, log-probabilities and drift over the steps of all rounds."""

from __future__ import annotations

import itertools

import polars as pl

from ple_data.report import figures, reading
from ple_data.report.section import Section

CURVE_POINTS = 48
"""Points of a training curve, each the mean of as many steps as it takes."""


def training(metrics: dict[int, pl.DataFrame], *, by_set: bool, by_eq6: bool) -> Section:
    """Curves of the trainer's metrics, by round; a word where there are none. by_set: the loss has a term for each set;
    by_eq6: it is the printed one."""
    section = Section("training", "Loss and drift")
    if not metrics:
        section.missing.append("No metrics: ple run leaves them in RUN/metrics, one file a round.")
        return section
    steps, borders = numbered(metrics)
    every = -(-steps.height // CURVE_POINTS)
    means = "a point a step" if every == 1 else f"means of {every} steps"
    names = {"rank": "loss_rank", "weighted SFT": "loss_wsft"} if by_set else {}
    found = curves_of(steps, names, every)
    terms = {name: points for name, points in found.items() if any(value for _, value in points)}
    said = f"Terms of Eq. 6, per pair of the batch; {means}. They are linear in log-probabilities: below 0 is no fault."
    if not by_eq6:
        said = f"The loss by set, per pair of the batch; {means}."
    if not terms:
        terms, said = curves_of(steps, {"loss": "loss"}, every), f"The loss of the method that trained; {means}."
    section.draw("loss", "Loss by step", said, figures.training(terms, borders, "loss"), reading.curves(terms))
    logps = {
        "rank, y_prompt": "mean_logps_rank_y_prompt",
        "rank, y": "mean_logps_rank_y",
        "weighted SFT, y_prompt": "mean_logps_wsft_y_prompt",
        "weighted SFT, y": "mean_logps_wsft_y",
    }
    if curves := curves_of(steps, logps, every):
        section.draw(
            "log-probabilities",
            "Log-probability of the responses",
            f"Mean log π(token | x) by set and response, in nats a token; {means}.",
            figures.training(curves, borders, "nats a token"),
            reading.logps(curves),
        )
    if curves := curves_of(steps, {"responses pushed down": "drift_pushed_down"}, every):
        section.draw(
            "drift",
            "Drift from the start policy",
            "Mean log-probability now less the start policy's, of responses that are pushed down. Far below 0 they run "
            f"away{', since the printed loss has no lower bound' if by_eq6 else ''}.",
            figures.training(curves, borders, "nats a token"),
            reading.drift(next(iter(curves.values()))),
        )
    else:
        section.missing.append("No drift: ple-train alone measures it, and only where it trains an adapter.")
    return section


def numbered(metrics: dict[int, pl.DataFrame]) -> tuple[pl.DataFrame, dict[int, int]]:
    """The steps of all rounds numbered through (column `at`), and how many lie before each round."""
    steps = pl.concat([table.cast(pl.Float64) for table in metrics.values()], how="diagonal")
    before = itertools.accumulate((table.height for table in metrics.values()), initial=0)
    return steps.with_columns(at=pl.int_range(1, pl.len() + 1)), dict(zip(metrics, before, strict=False))


def curves_of(steps: pl.DataFrame, names: dict[str, str], every: int) -> dict[str, list[tuple[float, float]]]:
    """Points (step, value) of each column that has values, each the mean of `every` steps."""
    found = {}
    for name, column in names.items():
        if column in steps.columns and steps[column].count():
            means = (
                steps.select("at", column)
                .drop_nulls()
                .group_by((pl.col("at") - 1) // every, maintain_order=True)
                .agg(pl.col("at").mean().alias("step"), pl.col(column).mean())
            )
            found[name] = list(zip(means["step"], means[column], strict=True))
    return found
