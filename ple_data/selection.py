"""Which responses of a store a method learns from: plain tables of rows, in polars. No torch, no files.

PLE weighs every pair (`ple_data.partition`). Its baselines, and exports for other tools, choose instead: y_prompt given
x, the best of N responses, or the better of a pair. Each function takes pairs with their texts, their token ids or
both, and carries what there is. A query is known by its id and x: two stores may have the same ids.
"""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl

from schemas.errors import UsageError
from schemas.options import of_pairs

ARMS = {"y": "s", "y_prompt": "s_prompt"}
"""The arms of a pair, each with its reward."""
_PARTS = {"": "y", "_ids": "ids"}
"""What there is of a response: the end of its column in pairs, and its name where each response is a row."""


def answered(rows: pl.DataFrame, *arms: str) -> pl.DataFrame:
    """The pairs of which these arms have an answer: no thought that never ended, as far as the columns tell."""
    told = [f"{arm}_answered" for arm in arms if f"{arm}_answered" in rows.columns]
    return rows.filter(*(pl.col(name).fill_null(value=True) for name in told)) if told else rows


def responses(rows: pl.DataFrame) -> pl.DataFrame:
    """Every response of every pair as a row of its own: query_id, round, x, x_ids, sample, arm, y, ids and reward."""
    return pl.concat(
        [
            rows.select(
                *_query(rows),
                "sample",
                pl.lit(arm).alias("arm"),
                *[pl.col(arm + part).alias(name) for part, name in _PARTS.items() if arm + part in rows.columns],
                pl.col(reward).alias("reward"),
            )
            for arm, reward in ARMS.items()
        ]
    )


def _query(rows: pl.DataFrame) -> list[str]:
    return [name for name in ("query_id", "round", "x", "x_ids") if name in rows.columns]


def guided(rows: pl.DataFrame) -> pl.DataFrame:
    """Context distillation: y_prompt, to be learned given x alone."""
    return responses(rows).filter(pl.col("arm") == "y_prompt")


def best_of_n(rows: pl.DataFrame) -> pl.DataFrame:
    """RAFT (Dong et al. 2023): the response with the highest reward of each query and round, and of how many (n).

    All samples and both arms compete, but thoughts that never ended, where the columns tell; of equal rewards the first
    sample wins, in it y. Where the samples of a query stand in several tables, the choices from each are candidates for
    `best`. Raises UsageError where the rewards are of pairs.
    """
    refuse_of_pairs(rows["reward_model"].unique() if "reward_model" in rows.columns else ())
    whole = pl.concat([responses(answered(rows, arm)).filter(pl.col("arm") == arm) for arm in ARMS])
    return best(whole.with_columns(pl.lit(1, dtype=pl.UInt32).alias("n")))


def refuse_of_pairs(models: Iterable[str]) -> None:
    """Raise UsageError where responses of several pairs would be compared by a reward that is of a pair together."""
    if name := next(filter(of_pairs, models), None):
        raise UsageError(
            f"rewards by {name} compare the two responses of a pair and no others: this needs another --combine"
        )


def best(candidates: pl.DataFrame) -> pl.DataFrame:
    """The best of the responses to each query and round, each of them the best of n; n adds up."""
    query = _query(candidates)
    order = ["query_id", "round", "reward", "sample", "arm"]
    ranked = candidates.sort(order, descending=[name == "reward" for name in order], maintain_order=True)
    return ranked.group_by(query, maintain_order=True).agg(pl.exclude(*query, "n").first(), pl.col("n").sum())


def preferences(rows: pl.DataFrame) -> pl.DataFrame:
    """Pairs by reward: chosen is the response with the higher one; pairs with equal rewards (ties) are not in it.

    Columns: those of the query, sample, then chosen, chosen_ids, chosen_reward and the same of rejected.
    """
    prompted = pl.col("s_prompt") > pl.col("s")
    parts = {part: ("y" + part, "y_prompt" + part) for part in _PARTS if "y" + part in rows.columns}
    parts["_reward"] = "s", "s_prompt"
    return rows.filter(pl.col("s") != pl.col("s_prompt")).select(
        *_query(rows),
        "sample",
        *[
            pl.when(takes_prompt).then(pl.col(of_y_prompt)).otherwise(pl.col(of_y)).alias(side + part)
            for part, (of_y, of_y_prompt) in parts.items()
            for side, takes_prompt in (("chosen", prompted), ("rejected", ~prompted))
        ],
    )


def references(rows: pl.DataFrame) -> pl.DataFrame:
    """SFT: the reference that came with each query (y), once a query; queries without one are not in it."""
    known = rows.filter(pl.col("reference").is_not_null())
    return first_of_each_query(known.select(*_query(rows), pl.col("reference").alias("y")))


def first_of_each_query(rows: pl.DataFrame) -> pl.DataFrame:
    """One row a query, whatever the rounds."""
    query = [name for name in _query(rows) if name != "round"]
    return rows.unique(query, keep="first", maintain_order=True)
