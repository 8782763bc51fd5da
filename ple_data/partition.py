"""The math on rows (Eqs. 3-5 and 7): which set a pair is in, and the coefficient of each response, in polars.

Every term of the loss is linear in log-probabilities. So one pair costs `- c * sum_j log pi(y^j | x) - c_prompt *
sum_j log pi(y_prompt^j | x)` (Eqs. 3, 4, 6), with coefficients that depend on its stored row alone. Whoever needs them
uses these expressions. This room reads no file and keeps no rows.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import polars as pl

from ple_data.storage.quantiles import quantiles_by_round
from ple_data.storage.store import collect
from schemas.errors import UsageError
from schemas.options import Without
from schemas.tables import ARMS

QUANTILES = {"margin_q05": 0.05, "margin_q25": 0.25, "margin_q50": 0.5, "margin_q75": 0.75, "margin_q95": 0.95}


def tau(tau0: float, alpha: float, t: int) -> float:
    """The threshold of round t = 0, 1, ...: tau_t = tau0 * alpha**t (Eq. 7), in units of the reward.

    Raises UsageError unless tau0 is finite and not negative, 0 < alpha < 1 and t >= 0.
    """
    if not 0 < alpha < 1:
        raise UsageError(f"alpha = {alpha}: the decay of tau must lie strictly between 0 and 1 (the paper has 0.9)")
    if not (math.isfinite(tau0) and tau0 >= 0):
        raise UsageError(f"tau0 = {tau0}: must be a finite number >= 0 in units of the reward (the paper has 0.2)")
    if t < 0:
        raise UsageError(f"round {t}: rounds are counted from 0")
    return tau0 * alpha**t


def partition(
    tau: float | pl.Expr, *, normalize_wsft: bool = False, anchor: float = 0.0, without: Without | None = None
) -> list[pl.Expr]:
    """Expressions for `with_columns` or `select` on rows with `s, s_prompt, y_ids, y_prompt_ids`.

    They give, per row, in float64:
      margin       s_prompt - s
      set          "rank" where margin > tau (strictly), else "wsft" (Eqs. 3, 4)
      w, w_prompt  tanh((s - s_prompt) / 2) and its negative: Eq. 5 without its overflow, in every row
      c, c_prompt  what multiplies sum_j log pi of y and of y_prompt, each given x:
                   rank: -1/len(y), +1/len(y_prompt) (Eq. 3); wsft: w, w_prompt (Eq. 4)
    A response of length 0 has no tokens to multiply: where a coefficient is divided by it, it is 0.

    Beyond the paper, off by default: `normalize_wsft` divides the weighted-SFT coefficients by the response's length;
    `anchor` adds anchor/len to the coefficient of the response with the higher reward (none on a tie).

    `without` leaves out a term of Eq. 6 (the ablations of Tables 4 and 5): `rank` puts every row in the weighted-SFT
    set; `wsft` keeps the sets and gives the rows of the weighted-SFT set the coefficients 0.
    """
    margin = _float("s_prompt") - _float("s")
    rank = pl.lit(False) if without == "rank" else margin > tau
    w = (-margin / 2).tanh()
    per_token, per_token_prompt = _inverse_length("y_ids"), _inverse_length("y_prompt_ids")
    wsft, wsft_prompt = (w * per_token, -w * per_token_prompt) if normalize_wsft else (w, -w)
    if without == "wsft":
        wsft = wsft_prompt = pl.lit(0.0)
    c = pl.when(rank).then(-per_token).otherwise(wsft)
    c_prompt = pl.when(rank).then(per_token_prompt).otherwise(wsft_prompt)
    if anchor:
        c += pl.when(margin < 0).then(anchor * per_token).otherwise(0.0)
        c_prompt += pl.when(margin > 0).then(anchor * per_token_prompt).otherwise(0.0)
    return [
        margin.alias("margin"),
        pl.when(rank).then(pl.lit("rank")).otherwise(pl.lit("wsft")).alias("set"),
        w.alias("w"),
        (-w).alias("w_prompt"),
        c.alias("c"),
        c_prompt.alias("c_prompt"),
    ]


def _float(column: str) -> pl.Expr:
    return pl.col(column).cast(pl.Float64)


def _inverse_length(ids: str) -> pl.Expr:
    length = pl.col(ids).list.len().cast(pl.Float64)
    return pl.when(length > 0).then(1 / length).otherwise(0.0)


def reward_statistics(rows: pl.LazyFrame, models: Sequence[str]) -> list[dict[str, Any]]:
    """Of each of several reward models whose rewards were put together, in their order: its `model`, `mean_y` and
    `mean_y_prompt` over the pairs, and `correlations` with each over all responses (Pearson; None of one that is
    constant).
    """
    if not models:
        return []
    arms = {"mean_y": "rewards", "mean_y_prompt": "rewards_prompt"}
    of_arms = {
        name: rows.select(pl.col(column).list.get(at).cast(pl.Float64).alias(str(at)) for at in range(len(models)))
        for name, column in arms.items()
    }
    means = {name: collect(frame.mean()).row(0) for name, frame in of_arms.items()}
    places = [(a, b) for a in range(len(models)) for b in range(len(models))]
    both = pl.concat(of_arms.values())
    found = collect(both.select(pl.corr(str(a), str(b)).fill_nan(None).alias(f"{a} {b}") for a, b in places)).row(0)
    correlations = dict(zip(places, found, strict=True))
    return [
        {"model": model, **{name: values[at] for name, values in means.items()}}
        | {"correlations": [correlations[at, other] for other in range(len(models))]}
        for at, model in enumerate(models)
    ]


def round_statistics(rows: pl.LazyFrame, tau0: float, alpha: float, at_round: int | None = None) -> pl.DataFrame:
    """One line for each round of the pairs `rows`, in order; streamed (of its quantiles see `quantiles_by_round`).

    Columns: round, tau, rows, mean_s, mean_s_prompt, mean_margin, margin_q05 ... margin_q95, rank_share (at tau),
    lowered_share (the principle lowered the reward: margin < 0), then for each arm truncated_y/_y_prompt (cut by
    length), empty_..., mean_len_... in tokens. Shares are fractions of the round's rows.

    tau is tau_t of the row's own round, or, with `at_round`, that of the round that trains: a row keeps its rewards and
    changes its set. Raises UsageError as `tau` does.
    """
    trained = tau(tau0, alpha, at_round or 0)
    threshold = own_tau(rows, tau0, alpha) if at_round is None else pl.lit(trained)
    by_arm = [f"{what}_{arm}" for what in ("truncated", "empty", "mean_len") for arm in ARMS]
    columns = rows.select(
        "round",
        threshold.alias("tau"),
        *partition(threshold)[:2],
        _float("s"),
        _float("s_prompt"),
        *[(pl.col(f"{arm}_finish") == "length").alias(f"truncated_{arm}") for arm in ARMS],
        *[pl.col(f"{arm}_empty").alias(f"empty_{arm}") for arm in ARMS],
        *[pl.col(f"{arm}_ids").list.len().alias(f"mean_len_{arm}") for arm in ARMS],
    )
    margin = pl.col("margin")
    means = collect(
        columns.group_by("round")
        .agg(
            pl.col("tau").first(),
            pl.len().cast(pl.Int64).alias("rows"),
            pl.col("s").mean().alias("mean_s"),
            pl.col("s_prompt").mean().alias("mean_s_prompt"),
            margin.mean().alias("mean_margin"),
            (pl.col("set") == "rank").mean().alias("rank_share"),
            (margin < 0).mean().alias("lowered_share"),
            pl.col(by_arm).mean(),
        )
        .sort("round")
    )
    spread = quantiles_by_round(columns, "margin", QUANTILES, dict(means.select("round", "rows").iter_rows()))
    return means.join(spread, on="round", maintain_order="left").select(
        *("round", "tau", "rows", "mean_s", "mean_s_prompt", "mean_margin", *QUANTILES),
        *("rank_share", "lowered_share", *by_arm),
    )


def rank_shares(rows: pl.LazyFrame, tau: float) -> pl.DataFrame:
    """round, rows and rank_share (at tau) of the pairs `rows`, in order; reads the rewards alone."""
    _, in_set, *_ = partition(tau)
    return collect(
        rows.select("round", in_set)
        .group_by("round")
        .agg(pl.len().cast(pl.Int64).alias("rows"), (pl.col("set") == "rank").mean().alias("rank_share"))
        .sort("round")
    )


def own_tau(rows: pl.LazyFrame, tau0: float, alpha: float) -> pl.Expr:
    """tau_t of each row's own round t: the very numbers of `tau`, so that equal margins fall in the same set.

    Reads the rounds that there are.
    """
    return tau_of(collect(rows.select(pl.col("round").unique()).sort("round"))["round"].to_list(), tau0, alpha)


def tau_of(rounds: Iterable[int], tau0: float, alpha: float) -> pl.Expr:
    """As `own_tau`, where the rounds are known. (A flat choice, since `replace_strict` does not stream.)"""
    choices = [pl.when(pl.col("round") == t).then(tau(tau0, alpha, t)) for t in rounds]
    return pl.coalesce([*choices, pl.lit(None, dtype=pl.Float64)])


def warnings(statistics: pl.DataFrame) -> list[str]:
    """One sentence for each round of `round_statistics` in which all rows, or none, are in the rank set."""
    messages = []
    for row in statistics.filter(pl.col("rank_share").is_in([0.0, 1.0])).iter_rows(named=True):
        spread = f"5-95 % of the margins are {row['margin_q05']:.3g} to {row['margin_q95']:.3g}"
        what, todo = "none", "a lower --tau0 or a principle that raises the reward more would change that"
        if row["rank_share"]:
            what, todo = "all", "a higher --tau0 would leave some to weighted SFT"
        messages.append(
            f"round {row['round']}: {what} of the {row['rows']} rows in the rank set at tau = {row['tau']:.3g} "
            f"({spread}; tau is in units of the reward): {todo}"
        )
    return messages
