"""Real IMDb reviews → what a pretrained model needs: queries, rows for a reward model, and a judge that it never sees.

    python recipes/real/prepare.py --data imdb.parquet --output runs/real

Half of the training reviews teach the reward model (beginning, end and a part between of each, 56 words long), the
other half the judge (log-odds of words and word pairs, ../imdb/judge.py). x is the first 8 of a review's last 56 words.
Reads columns id (`<split>/<pos|neg>/<number>_<stars>`), text, label, split. Writes nothing outside --output.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import polars as pl

from schemas.files import write_atomic

sys.path.insert(0, str(Path(__file__).parents[1] / "imdb"))
import judge
import prepare

QUERIES, UNSEEN, VALIDATION = 4096, 512, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Parquet file with id, text, label, split")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    write(arguments.data, arguments.output)


def write(data: Path, output: Path) -> None:
    """The files, the same bytes each time."""
    reviews = prepare.read_reviews(data)
    train = reviews.filter(split="train").sample(fraction=1.0, shuffle=True, seed=0)
    for_reward, for_judge = train[: train.height // 2], train[train.height // 2 :]
    excerpts, held_out = prepare.excerpts(train), prepare.excerpts(reviews.filter(split="test"))
    unseen = held_out.sample(fraction=1.0, shuffle=True, seed=1)
    rows = {
        "reward": windows(for_reward),
        "reward-test": held_out.select(text=pl.col("x") + pl.col("y"), label=pl.col("label").cast(pl.Int64)),
        "queries": queries(excerpts, QUERIES, seed=3),
        "references": queries(excerpts.filter(label=1), QUERIES, seed=3),
        "unseen": queries(unseen[:UNSEEN], UNSEEN, seed=0),
        "validation": queries(unseen[UNSEEN : UNSEEN + VALIDATION], VALIDATION, seed=0),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, frame in rows.items():
        frame.write_parquet(output / f"{name}.parquet")
    weights = judge.train(for_judge["text"].to_list(), for_judge["label"].to_list())
    write_atomic(output / "judge.json", json.dumps(weights))


def queries(rows: pl.DataFrame, count: int, seed: int) -> pl.DataFrame:
    """`count` rows as queries with their references."""
    return rows.sample(min(count, rows.height), seed=seed).select("id", "x", pl.col("y").alias("reference"))


def windows(reviews: pl.DataFrame) -> pl.DataFrame:
    """text, label: beginning, end and a part between of each review, each as many words as an excerpt has."""
    long = reviews.with_columns(words=pl.col("text").str.split(" ")).with_columns(
        room=pl.col("words").list.len().cast(pl.Int64) - prepare.EXCERPT_WORDS
    )
    long = long.filter(pl.col("room") >= 0)
    between = pl.col("room").mul(pl.int_range(pl.len()) * 7919 % 1000).floordiv(1000)
    found = [
        long.select(pl.col("words").list.slice(start, prepare.EXCERPT_WORDS).list.join(" ").alias("text"), "label")
        for start in (pl.lit(0), pl.col("room"), between)
    ]
    return pl.concat(found).with_columns(pl.col("label").cast(pl.Int64)).sample(fraction=1.0, shuffle=True, seed=0)


if __name__ == "__main__":
    main()
