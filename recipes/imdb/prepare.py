"""Real IMDb reviews → everything the IMDb recipe needs: data files, a tokenizer and two untrained models.

    python recipes/imdb/prepare.py --data imdb.parquet --output runs/imdb

No weights are downloaded: the base model and the reward model start from random numbers and learn English from the
25,000 training reviews. Reads columns id (`<split>/<pos|neg>/<number>_<stars>`), text, label, split. Writes nothing
outside --output.
"""

import argparse
import json
import sys
from pathlib import Path

import polars as pl

from ple_data.inputs.principles import load_principle
from ple_train.demo.scratch import train_tokenizer, write_llama
from schemas.files import write_atomic

sys.path.insert(0, str(Path(__file__).parent))
import judge

VOCABULARY = 8192
CHUNK_TOKENS = 256
EXCERPT_WORDS, PREFIX_WORDS = 56, 8
"""An excerpt is the last 56 words of a review, where most of its verdict stands; x is the excerpt's first 8 words."""
STRONG_STARS = 9
QUERIES, UNSEEN = 4096, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Parquet file with id, text, label, split")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)

    reviews = read_reviews(arguments.data)
    train, test = reviews.filter(split="train"), reviews.filter(split="test")
    tokenizer = train_tokenizer(train["text"].to_list(), VOCABULARY, longest=1024)
    write_llama(output / "init", tokenizer, hidden=256, layers=4, heads=4, positions=1024)  # 5.4 million parameters
    write_reward_init(output / "reward-init", tokenizer)
    chunks(train["text"].to_list(), tokenizer).write_parquet(output / "pretrain.parquet")
    sft_rows(excerpts(train)).write_parquet(output / "sft.parquet")
    reward_rows(train).write_parquet(output / "reward.parquet")
    test.select("text", "label").write_parquet(output / "reward-test.parquet")
    queries(excerpts(train), QUERIES).write_parquet(output / "queries.parquet")
    unseen = excerpts(test).sample(UNSEEN, seed=1)
    unseen.select("id", "x").write_parquet(output / "unseen.parquet")
    excerpts(test).sample(2048, seed=2).select("x", "y").write_parquet(output / "perplexity.parquet")
    weights = judge.train(train["text"].to_list(), train["label"].to_list())
    write_atomic(output / "judge.json", json.dumps(weights))
    print(json.dumps({"train": train.height, "test": test.height, "vocabulary": len(tokenizer)}))


def read_reviews(path: Path) -> pl.DataFrame:
    """Reviews with their stars; test reviews whose text is also a training text are left out."""
    reviews = pl.read_parquet(path).with_columns(
        stars=pl.col("id").str.extract(r"_(\d+)$").cast(pl.Int32),
        text=pl.col("text").str.replace_all(r"\s+", " ").str.strip_chars(),
    )
    seen = reviews.filter(split="train").select("text").unique()
    return pl.concat([reviews.filter(split="train"), reviews.filter(split="test").join(seen, on="text", how="anti")])


def excerpts(reviews: pl.DataFrame) -> pl.DataFrame:
    """The last words of each review as prefix x and continuation y (which starts with its space)."""
    words = pl.col("text").str.split(" ").list.tail(EXCERPT_WORDS)
    return (
        reviews.with_columns(words=words)
        .filter(pl.col("words").list.len() == EXCERPT_WORDS)
        .with_columns(
            x=pl.col("words").list.head(PREFIX_WORDS).list.join(" "),
            y=" " + pl.col("words").list.slice(PREFIX_WORDS).list.join(" "),
        )
        .drop("words")
    )


def sft_rows(train: pl.DataFrame) -> pl.DataFrame:
    """Half (x → any review's end), half ([p, x] → a strong positive review's end): the stand-in for a base model
    that follows instructions, so that the principle means something to it."""
    principle = load_principle("imdb").text
    positive = train.filter(pl.col("stars") >= STRONG_STARS)
    guided = positive.with_columns(x=principle + "\n" + pl.col("x"))
    plain = train.sample(guided.height, seed=0)
    return pl.concat([plain, guided]).select("x", "y").sample(fraction=1.0, shuffle=True, seed=0)


def reward_rows(train: pl.DataFrame) -> pl.DataFrame:
    """Whole reviews and their excerpts, with the review's label."""
    short = excerpts(train).with_columns(text=pl.col("x") + pl.col("y"))
    rows = pl.concat([train.select("text", "label"), short.select("text", "label")])
    return rows.with_columns(pl.col("label").cast(pl.Int64)).sample(fraction=1.0, shuffle=True, seed=0)


def queries(train: pl.DataFrame, count: int) -> pl.DataFrame:
    return train.sample(count, seed=3).select("id", "x")


def chunks(texts: list[str], tokenizer) -> pl.DataFrame:
    """Reviews cut into pieces of CHUNK_TOKENS; only a review's last piece ends with an end-of-sequence id."""
    rows = []
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        pieces = [ids[start : start + CHUNK_TOKENS] for start in range(0, len(ids), CHUNK_TOKENS)]
        if len(pieces) == 1:
            rows.append(("", text, "stop"))
            continue
        rows += [("", tokenizer.decode(piece), "length") for piece in pieces[:-1]]
        rows.append(("", tokenizer.decode(pieces[-1]), "stop"))
    return pl.DataFrame(rows, schema=["x", "y", "finish"], orient="row")


def write_reward_init(directory: Path, tokenizer) -> None:
    """A ModernBERT of 1.4 million parameters that averages over the last 256 tokens of a text."""
    import torch
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        classifier_pooling="mean",
        embedding_dropout=0.1,
        mlp_dropout=0.1,
        classifier_dropout=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
    )
    ModernBertForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main()
