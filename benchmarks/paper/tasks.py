"""The three tasks of the paper at a size for two CPU cores: real data in, every file that the methods need out.

No pretrained weights: `prepare` writes an untrained Llama, and the files from which `ple sft` and `ple reward` make a
base model, a start policy and reward models. In the real variant a pretrained model is the start policy as it is, and
a pretrained encoder becomes the reward model. Sizes and stand-ins are the constants below and are stated in
docs/results. Never trains and never samples.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from ple_data.inputs.principles import load_principle
from ple_train.demo.scratch import train_tokenizer, write_llama
from schemas.files import write_atomic

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes" / "imdb"))
import judge  # noqa: E402
import prepare  # noqa: E402

from recipes.real import prepare as real  # noqa: E402
from recipes.real.prepare import queries  # noqa: E402

VOCABULARY, HIDDEN, LAYERS, HEADS, POSITIONS = 4096, 128, 4, 2, 512
"""1.4 million parameters."""
BEST = 0.25
"""Share of the candidates, those with the highest training reward, that the start policy learns to give under p."""
UNSEEN, VALIDATION = 512, 256
"""Queries that the tables report on, and those on which settings are chosen; neither is in training."""


@dataclass(frozen=True)
class Task:
    """What differs between the tasks beyond their data files."""

    name: str
    title: str
    principle: str
    prepare: Callable[[dict[str, Path], Path], None]
    inputs: tuple[str, ...]
    max_new_tokens: int
    reward: str
    """Spec of the reward model that trains, relative to the task's directory."""
    second_judge: str
    """Spec of the reward model that no training sees."""
    tables: str
    queries_per_round: int
    """PLE samples two responses to each. Every method that samples gets as many tokens."""
    rounds: int = 4
    updates: int = 160
    """Of PLE in all rounds, whatever the queries of a round."""
    reward_epochs: int = 1
    tone: Callable[[pl.Expr], pl.Expr] = lambda text: text
    """What the start policy's answers under the principle look like beside their meaning."""
    asked: dict[str, Any] = field(default_factory=dict)
    """Options of sampling beside lengths, as a recipe writes them."""
    rate: float | None = None
    """The learning rate of every method whose brake is another option; None: some are tried."""
    brakes: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """By method of the frontier, the values of its brake here; empty: every method, with its own."""

    precision: str = "auto"
    """Of what is sampled, trained and measured: auto, float32 or bf16."""

    @property
    def dtype(self) -> str:
        """`precision` as engines name it."""
        return self.precision.replace("bf16", "bfloat16")

    @property
    def is_pretrained(self) -> bool:
        return "model" in self.inputs

    def asked_words(self, *names: str) -> list[str]:
        """`asked`, or those named of it, as words of a command."""
        words = []
        for name in names or self.asked:
            value = self.asked.get(name, [])
            for one in value if isinstance(value, list) else [value]:
                words += [f"--{name.replace('_', '-')}", str(one)]
        return words


def write_world(output: Path, rows: dict[str, pl.DataFrame], corpus: list[str]) -> None:
    """Write the data files and the untrained model; the same bytes each time."""
    output.mkdir(parents=True, exist_ok=True)
    for name, frame in rows.items():
        frame.write_parquet(output / f"{name}.parquet")
    tokenizer = train_tokenizer(corpus, VOCABULARY, longest=POSITIONS)
    write_llama(output / "init", tokenizer, hidden=HIDDEN, layers=LAYERS, heads=HEADS, positions=POSITIONS)


def guided(rows: pl.DataFrame, principle: str) -> pl.DataFrame:
    """The same rows with [p, x] for x."""
    text = load_principle(principle).text
    return rows.with_columns(x=pl.lit(text + "\n") + pl.col("x"))


def start_rows(candidates: pl.DataFrame, rewards: list[float], task: Task) -> pl.DataFrame:
    """Half x → any response, half [p, x] → one of the best: the stand-in for a base that follows instructions."""
    best = candidates.filter(pl.Series(rewards) >= pl.Series(rewards).quantile(1 - BEST))
    plain = candidates.sample(best.height, seed=0)
    rows = pl.concat([plain.select("x", "y"), guided(best, task.principle).select("x", task.tone(pl.col("y")))])
    return rows.sample(fraction=1.0, shuffle=True, seed=0)


def bare(text: pl.Expr) -> pl.Expr:
    """Lower case without punctuation: unlikely where nobody asked for it, and the same to a judge of words."""
    return text.str.to_lowercase().str.replace_all(r"[^a-z0-9' ]", "")


# IMDb

PRETRAINING_WORDS = 100
"""Excerpts (the last 56 words of a review) and prefixes x (the first 8 of those) are the IMDb recipe's."""


def prepare_imdb(inputs: dict[str, Path], output: Path) -> None:
    """Queries: prefixes of excerpts; SFT's references: positive ones. The second judge is log-odds of words."""
    reviews = prepare.read_reviews(inputs["data"])
    train, test = reviews.filter(split="train"), reviews.filter(split="test")
    excerpts, held_out = prepare.excerpts(train), prepare.excerpts(test)
    unseen = held_out.sample(fraction=1.0, shuffle=True, seed=1)
    tail = pl.col("text").str.split(" ").list.tail(PRETRAINING_WORDS).list.join(" ")
    labelled = (pl.col("x") + pl.col("y")).alias("text"), pl.col("label").cast(pl.Int64)
    write_world(
        output,
        {
            "pretrain": train.select(pl.lit("").alias("x"), tail.alias("y")),
            "candidates": excerpts.select("x", "y"),
            "reward": excerpts.select(*labelled).sample(fraction=1.0, shuffle=True, seed=0),
            "reward-test": held_out.select(*labelled),
            "queries": queries(excerpts, 4096, seed=3),
            "references": queries(excerpts.filter(label=1), 4096, seed=3),
            "unseen": queries(unseen[:UNSEEN], UNSEEN, seed=0),
            "validation": queries(unseen[UNSEEN : UNSEEN + VALIDATION], VALIDATION, seed=0),
        },
        train["text"].to_list(),
    )
    write_atomic(output / "judge.json", json.dumps(judge.train(train["text"].to_list(), train["label"].to_list())))


def prepare_real(inputs: dict[str, Path], output: Path) -> None:
    """IMDb for a pretrained model: half of the training reviews teach the reward model, the others the judge."""
    real.write(inputs["data"], output)
    for name, given in (("start", "model"), ("encoder", "encoder")):
        (output / name).symlink_to(inputs[given], target_is_directory=True)


# TL;DR

POST_WORDS = 64
"""A post keeps its title and its first 64 words."""


def prepare_tldr(inputs: dict[str, Path], output: Path) -> None:
    """Queries: posts cut short. Preferences train the reward models, one half each."""
    posts = pl.read_parquet(inputs["data"]).with_columns(x=_short_post(), y=" " + pl.col("summary"))
    train, test = posts.filter(split="train"), posts.filter(split="test").sample(fraction=1.0, shuffle=True, seed=1)
    preferences = pl.read_parquet(inputs["preferences"]).with_columns(
        prompt=_short_post(), chosen=" " + pl.col("chosen"), rejected=" " + pl.col("rejected")
    )
    wanted = preferences.filter(split="train").sample(fraction=1.0, shuffle=True, seed=0)
    short = train.filter(pl.col("y").str.split(" ").list.len().is_between(12, 40))
    write_world(
        output,
        {
            "pretrain": train.select("x", "y"),
            "candidates": short.select("x", "y"),
            **_halves(wanted, preferences.filter(split="test")),
            "queries": queries(short, 4096, seed=3),
            "references": queries(short, 4096, seed=3),
            "unseen": queries(test[:UNSEEN], UNSEEN, seed=0),
            "validation": queries(test[UNSEEN : UNSEEN + VALIDATION], VALIDATION, seed=0),
        },
        (train["x"] + train["y"]).to_list(),
    )


def _short_post() -> pl.Expr:
    parts = pl.col("prompt").str.extract_groups(
        r"(?s)^SUBREDDIT: (?<sub>.*?)\n\nTITLE: (?<title>.*?)\n\nPOST: (?<post>.*)\n\nTL;DR:$"
    )
    post = parts.struct.field("post").str.replace_all(r"\s+", " ").str.split(" ").list.head(POST_WORDS).list.join(" ")
    return pl.format("TITLE: {}\nPOST: {}\nTL;DR:", parts.struct.field("title"), post)


# HH

TURN_WORDS, ANSWER_WORDS = 48, 60
"""x is the last human turn of a dialogue, cut to 48 words; answers are cut to 60."""


def prepare_hh(inputs: dict[str, Path], output: Path) -> None:
    """Queries: last human turns. Chosen and rejected answers train the reward models, one half each."""
    rows = pl.read_parquet(inputs["data"]).with_columns(
        prompt=pl.format(
            "\n\nHuman: {}\n\nAssistant:",
            _cut(pl.col("prompt").str.extract(r"(?s).*\n\nHuman:(.*?)\n\nAssistant:$"), TURN_WORDS),
        ),
        chosen=" " + _cut(pl.col("chosen"), ANSWER_WORDS),
        rejected=" " + _cut(pl.col("rejected"), ANSWER_WORDS),
    )
    rows = rows.with_columns(x=pl.col("prompt"), y=pl.col("chosen"))
    train, test = rows.filter(split="train"), rows.filter(split="test").sample(fraction=1.0, shuffle=True, seed=1)
    both = pl.concat([train.select("x", "y"), train.select("x", pl.col("rejected").alias("y"))])
    wanted = train.filter(pl.col("chosen") != pl.col("rejected")).sample(fraction=1.0, shuffle=True, seed=0)
    write_world(
        output,
        {
            "pretrain": both.sample(fraction=1.0, shuffle=True, seed=0),
            "candidates": both,
            **_halves(wanted, test),
            "queries": queries(train, 4096, seed=3),
            "references": queries(train, 4096, seed=3),
            "unseen": queries(test[:UNSEEN], UNSEEN, seed=0),
            "validation": queries(test[UNSEEN : UNSEEN + VALIDATION], VALIDATION, seed=0),
        },
        (both["x"] + both["y"]).to_list(),
    )


def _cut(text: pl.Expr, words: int) -> pl.Expr:
    return text.str.strip_chars().str.split(" ").list.head(words).list.join(" ")


def _halves(train: pl.DataFrame, test: pl.DataFrame) -> dict[str, pl.DataFrame]:
    columns = ["prompt", "chosen", "rejected"]
    half = train.height // 2
    return {
        "reward": train[:half].select(columns),
        "second": train[half:].select(columns),
        "reward-test": test.select(columns),
    }


WORD_JUDGE = f"{ROOT / 'recipes' / 'imdb' / 'judge.py'}:score"
_TWO_INPUTS = ("data", "preferences")
IMDB = Task("imdb", "IMDb", "imdb", prepare_imdb, ("data",), 48, "reward[1]", WORD_JUDGE, "Tables 2 and 4", 256)
IMDB_BARE = replace(
    IMDB,
    name="imdb-bare",
    title="IMDb, bare under the principle",
    tone=bare,
    brakes={
        "dpo": (0.3, 0.1, 0.03, 0.01),
        "dpo-means": (10, 5, 3, 1.5),
        "stable-ple": (0.15, 0.3, 0.6, 1.0),
        "ple-residual": (6, 3, 1.5, 1),
        "ple-residual-sums": (0.1, 0.05, 0.03, 0.015),
    },
)
"""y_prompt is unlikely under x here, half as far below y as a real model's (docs/results/README.md): does that turn the
order of methods that learn from both arms?"""
IMDB_SMOLLM2 = Task(
    "imdb-smollm2",
    "IMDb, SmolLM2-135M-Instruct",
    "imdb",
    prepare_real,
    ("data", "model", "encoder"),
    64,
    "reward[1]",
    WORD_JUDGE,
    "Tables 2 and 4",
    256,
    rounds=2,
    updates=48,
    reward_epochs=2,
    asked={"prompt_format": "plain", "stop": ["\n"]},
    rate=3e-4,
    brakes={
        "dpo": (0.3, 0.1, 0.03),
        "stable-ple": (0.3, 0.6, 1.0),
        "ple-residual": (6, 3, 1),
        "ple-residual-sums": (0.1, 0.05, 0.02),
        "dpo-means": (10, 3),
        "ple": (1e-4, 2e-4),
        "raft": (3e-4, 1e-3),
        "sft": (1e-4, 3e-4),
        "context-distillation": (3e-4, 1e-3),
        "on-policy-distillation": (3e-4, 1e-3),
    },
)
"""The rate, and the brakes' range, are those of docs/results/real-one-round.md."""
MAIN_BRAKES = {
    "dpo": (0.2, 0.05),
    "stable-ple": (0.3, 1.0),
    "ple-residual": (3, 1),
    "ple-residual-sums": (0.05, 0.02),
}
IMDB_QWEN = replace(IMDB_SMOLLM2, name="imdb-qwen", title="IMDb, Qwen2.5-Coder-0.5B-Instruct", brakes=MAIN_BRAKES)
IMDB_GEMMA = replace(IMDB_SMOLLM2, name="imdb-gemma", title="IMDb, Gemma 3 270M, a base model", brakes=MAIN_BRAKES)
TASKS = {
    task.name: task
    for task in (
        IMDB,
        IMDB_BARE,
        IMDB_SMOLLM2,
        IMDB_QWEN,
        IMDB_GEMMA,
        Task(
            "tldr",
            "TL;DR",
            "tldr",
            prepare_tldr,
            _TWO_INPUTS,
            40,
            "reward",
            "second",
            "Tables 3 and 5",
            128,
            reward_epochs=4,
        ),
        Task("hh", "HH", "hh", prepare_hh, ("data",), 48, "reward", "second", "Table 1", 128, reward_epochs=2),
    )
}
