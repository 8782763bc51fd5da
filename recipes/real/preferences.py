"""Real preferences → files for `ple reward`: does a reward model beat "longer wins" there?

    python recipes/real/preferences.py --hh hh.parquet --tldr tldr_preferences.parquet --output runs/rewards

Reads columns prompt, chosen, rejected, split, and subset of HH. Each file keeps the pairs whose answers differ.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import polars as pl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hh", type=Path, required=True, help="Parquet file of HH's dialogues")
    parser.add_argument("--tldr", type=Path, required=True, help="Parquet file of TL;DR's preferences")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    hh, tldr = read(arguments.hh).rename({"subset": "group"}), read(arguments.tldr)
    base, helpful = pl.col("group") == "helpful-base", pl.col("group").str.starts_with("helpful")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, rows in {"base": hh.filter(base), "helpful": hh.filter(helpful), "hh": hh, "tldr": tldr}.items():
        for split in ("train", "test"):
            rows.filter(split=split).drop("split", "id").write_parquet(arguments.output / f"{name}-{split}.parquet")


def read(path: Path) -> pl.DataFrame:
    """The pairs, an answer as it stands behind its prompt."""
    rows = pl.read_parquet(path).filter(pl.col("chosen").str.strip_chars() != pl.col("rejected").str.strip_chars())
    return rows.with_columns(
        pl.format(" {}", pl.col(answer).str.strip_chars()).alias(answer) for answer in ("chosen", "rejected")
    )


if __name__ == "__main__":
    main()
