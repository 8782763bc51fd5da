"""How much of a batch is useful? Share of positions that are no padding, on the lengths of real data, by layout.

`shared` also says how many positions it saves: a prompt stands there once for both responses. `arrival order` is what
a script does: rows as they come, padded to the longest of the batch.

    python -m benchmarks.padding --tokenizer M --data hh.parquet --columns prompt,chosen,rejected
    python -m benchmarks.padding --tokenizer M --data tldr_preferences.parquet --columns prompt,chosen,rejected
    python -m benchmarks.padding --tokenizer M --data imdb.parquet --columns text,text --prompt-words 8
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ple_train.model.batches import Layout, Sequence, micro_batches
from ple_train.model.policy import COLLATE

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a directory or a hub id")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--columns", required=True, help="x and its responses, or with --prompt-words whole texts")
    parser.add_argument("--prompt-words", type=int, help="x is as many first words of a text")
    parser.add_argument("--longest", type=int, default=1024, help="longer ones are cut")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--microbatch-tokens", type=int, default=8192)
    options = parser.parse_args()
    sequences = read_sequences(options)
    lengths = np.array([len(s.ids) for s in sequences])
    print(
        f"{len(sequences)} sequences, tokens by quartile {np.quantile(lengths, [0.25, 0.5, 0.75]).astype(int).tolist()}"
    )
    layouts: tuple[Layout, ...] = ("shared", "packed", "padded")
    for layout in layouts:
        positions, padding = count(sequences, layout, options.microbatch_tokens)
        share = 1 - padding / positions
        print(f"{layout:14} {100 * share:6.2f} % useful, {positions:,} positions for {lengths.sum():,} tokens")
    rows = [lengths[at : at + 2 * BATCH] for at in range(0, len(lengths), 2 * BATCH)]
    width = sum(int(row.max()) * len(row) for row in rows)
    print(f"{'arrival order':14} {100 * lengths.sum() / width:6.2f} % useful, {width:,} positions")


def read_sequences(options: argparse.Namespace) -> list[Sequence]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(options.tokenizer)
    x, *responses = options.columns.split(",")
    rows = pl.read_parquet(options.data)
    rows = rows.sample(min(options.rows, rows.height), seed=0)
    if options.prompt_words:
        words = pl.col(x).str.split(" ")
        rows = rows.select(
            words.list.head(options.prompt_words).list.join(" ").alias("x"),
            words.list.slice(options.prompt_words).list.join(" ").alias("y"),
        )
        x, responses = "x", ["y"]

    def ids(column: str) -> list[list[int]]:
        found: list[list[int]] = tokenizer(rows[column].to_list(), add_special_tokens=False)["input_ids"]
        return [one[: options.longest] for one in found]

    prompts, answers = ids(x), [ids(column) for column in responses]
    return [
        Sequence(np.array(prompt + arm[at], dtype=np.int32), len(prompt), query=at)
        for at, prompt in enumerate(prompts)
        for arm in answers
        if arm[at]
    ]


def count(sequences: list[Sequence], layout: Layout, budget: int) -> tuple[int, int]:
    """Positions computed and those that are padding, over batches of 16 pairs."""
    import torch

    positions = padding = 0
    for first in range(0, len(sequences), 2 * BATCH):
        batch = sequences[first : first + 2 * BATCH]
        for part in micro_batches(batch, len(batch), budget, 1, 0, layout=layout):
            tokens = COLLATE[layout](part.sequences, torch.device("cpu"))
            positions, padding = positions + tokens.positions, padding + tokens.padding
    return positions, padding


if __name__ == "__main__":
    main()
