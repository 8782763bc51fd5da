"""Which responses of a store a method learns from: plain tables of rows, in polars. No torch, no files.

PLE weighs every pair (`ple_data.partition`). Its baselines, and exports for other tools, choose instead: y_prompt given
x, the best of N responses, or the better of a pair. Each function takes pairs and gives its choice in their columns.
"""

from __future__ import annotations

import polars as pl

ARMS = {"y": "s", "y_prompt": "s_prompt"}
"""The arms of a pair, each with its reward."""
_KEPT = ["query_id", "round", "x", "x_ids"]


def responses(rows: pl.DataFrame) -> pl.DataFrame:
    """Every response of every pair as a row of its own: the kept columns, sample, arm, y, ids, finish and reward."""
    return pl.concat(
        [
            rows.select(
                *_KEPT,
                "sample",
                pl.lit(arm).alias("arm"),
                pl.col(arm).alias("y"),
                pl.col(f"{arm}_ids").alias("ids"),
                pl.col(f"{arm}_finish").alias("finish"),
                pl.col(reward).alias("reward"),
            )
            for arm, reward in ARMS.items()
        ]
    )


def guided(rows: pl.DataFrame) -> pl.DataFrame:
    """Context distillation: y_prompt, to be learned given x alone."""
    return responses(rows).filter(pl.col("arm") == "y_prompt")


def best_of_n(rows: pl.DataFrame) -> pl.DataFrame:
    """RAFT (Dong et al. 2023): the response with the highest reward of each (query, round), and of how many (n).

    All samples and both arms compete; of equal rewards the first sample wins, in it y. `rows` must hold all
    samples of a query: a shard of a store does.
    """
    order = ["query_id", "round", "reward", "sample", "arm"]
    ranked = responses(rows).sort(order, descending=[False, False, True, False, False])
    return ranked.group_by("query_id", "round", maintain_order=True).agg(
        pl.exclude("query_id", "round").first(), pl.len().alias("n")
    )


def preferences(rows: pl.DataFrame) -> pl.DataFrame:
    """Pairs by reward: chosen is the response with the higher one; pairs with equal rewards (ties) are not in it.

    Columns: the kept ones, sample, then chosen, chosen_ids, chosen_finish, chosen_reward and the same of rejected.
    """
    prompted = pl.col("s_prompt") > pl.col("s")
    sides = {"chosen": prompted, "rejected": ~prompted}
    return rows.filter(pl.col("s") != pl.col("s_prompt")).select(
        *_KEPT,
        "sample",
        *[
            pl.when(takes_prompt).then(pl.col(f"y_prompt{column}")).otherwise(pl.col(f"y{column}")).alias(side + column)
            for side, takes_prompt in sides.items()
            for column in ("", "_ids", "_finish")
        ],
        *[
            pl.when(takes_prompt).then(pl.col("s_prompt")).otherwise(pl.col("s")).alias(f"{side}_reward")
            for side, takes_prompt in sides.items()
        ],
    )


def references(rows: pl.DataFrame) -> pl.DataFrame:
    """SFT: the reference that came with each query (y), once a query; queries without one are not in it."""
    known = rows.filter(pl.col("reference").is_not_null())
    return known.unique("query_id", keep="first", maintain_order=True).select(*_KEPT, pl.col("reference").alias("y"))
