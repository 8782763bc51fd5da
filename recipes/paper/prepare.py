"""The paper's public datasets → the files that its recipes read.

    python recipes/paper/prepare.py hh
    python recipes/paper/prepare.py tldr --train train.parquet --test test.parquet --preferences preferences.parquet

A source is a file (Parquet, JSONL, JSON, CSV), several files, or a hub dataset with its split behind an @. Writes
nothing outside --output.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import polars as pl

from ple_data.inputs.chat import HH_TURN
from ple_data.inputs.queries import DEFAULT_PREFIX_WORDS, load_queries
from ple_data.inputs.readers import read_rows
from schemas.errors import PleError, UsageError
from schemas.files import write_atomic, writing_atomic
from schemas.options import Reading

sys.path.insert(0, str(Path(__file__).parent.parent / "imdb"))
import judge

PREFERENCES = "trl-internal-testing/tldr-preference-trl-style"
SOURCES = {
    "hh": {"train": "Anthropic/hh-rlhf@train", "test": "Anthropic/hh-rlhf@test"},
    "imdb": {"train": "stanfordnlp/imdb@train", "test": "stanfordnlp/imdb@test"},
    "tldr": {
        "train": "trl-lib/tldr@train",
        "test": "trl-lib/tldr@test",
        "preferences": f"{PREFERENCES}@train",
        "judge-preferences": f"{PREFERENCES}@validation",
    },
}
"""Of each task, where its parts come from if nothing else is given."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    for task, parts in SOURCES.items():
        command = tasks.add_parser(task)
        for part, default in parts.items():
            command.add_argument(f"--{part}", nargs="+", default=[default], help=f"default: {default}")
        command.add_argument("--output", type=Path, default=Path("runs/paper-data") / task)
    given = vars(parser.parse_args())
    task, output = given.pop("task"), given["output"]
    output.mkdir(parents=True, exist_ok=True)
    try:
        print(json.dumps({"hh": hh, "imdb": imdb, "tldr": tldr}[task](**given)))
    except PleError as error:
        sys.exit(f"error: {error}")


def hh(train: list[str], test: list[str], output: Path) -> dict[str, int]:
    """Dialogues as they are, and the chosen answers of the training ones for SFT: as text, and as chat messages."""
    counts = {}
    for name, sources in {"queries": train, "test": test}.items():
        texts = [row["chosen"] for row in read(sources, "chosen")]
        dialogues = [text for text in texts if is_dialogue(text)]
        counts |= {name: len(dialogues), f"{name} left out": len(texts) - len(dialogues)}
        write(pl.DataFrame({"chosen": dialogues}), output / f"{name}.parquet")
    how = Reading(reader="hh")
    write(load_queries(output / "queries.parquet", how).table.select("x", y="reference"), output / "sft.parquet")
    chats = load_queries(output / "queries.parquet", how, chat=True).queries
    lines = (json.dumps({"messages": q.x, "y": q.reference}, ensure_ascii=False) + "\n" for q in chats)
    write_atomic(output / "sft-chat.jsonl", "".join(lines))
    return counts


def is_dialogue(text: str) -> bool:
    """Whether it goes from a Human turn to an Assistant turn, and neither of the last two turns is empty."""
    turns = list(HH_TURN.finditer(text))
    if len(turns) < 2 or turns[0].group(1) != "Human" or turns[-1].group(1) != "Assistant":
        return False
    return bool(text[turns[-1].end() :].strip() and text[turns[-2].end() : turns[-1].start()].strip())


def imdb(train: list[str], test: list[str], output: Path) -> dict[str, int]:
    """First words and the rest of each review; SFT on positive ones; labels for the reward model; a second judge."""
    counts = {}
    for name, sources in {"queries": train, "test": test}.items():
        rows = [(row["text"].replace("<br />", "\n").strip(), row["label"]) for row in read(sources, "text", "label")]
        reviews = pl.DataFrame(
            [(text, int(label)) for text, label in rows if len(text.split()) > DEFAULT_PREFIX_WORDS],
            schema=["text", "label"],
            orient="row",
        )
        labelled = output / ("reward.parquet" if name == "queries" else "reward-test.parquet")
        write(reviews, labelled)
        found = load_queries(labelled, Reading(reader="imdb")).table
        write(found, output / f"{name}.parquet")
        counts[name] = found.height
        if name == "queries":
            write(found.filter(reviews["label"] == 1).select("x", y="reference"), output / "sft.parquet")
            weights = judge.train(reviews["text"].to_list(), reviews["label"].to_list())
            write_atomic(output / "judge.json", json.dumps(weights))
    return counts


def tldr(
    train: list[str], test: list[str], preferences: list[str], judge_preferences: list[str], output: Path
) -> dict[str, int]:
    """Posts and their summaries, and preferences for the reward model and for a second judge."""
    counts = {}
    for name, sources in {"queries": train, "test": test}.items():
        rows = [(row["prompt"], answer(row["completion"])) for row in read(sources, "prompt", "completion")]
        posts = pl.DataFrame(rows, schema=["x", "reference"], orient="row")
        write(posts, output / f"{name}.parquet")
        counts[name] = posts.height
        if name == "queries":
            write(posts.select("x", y="reference"), output / "sft.parquet")
    for name, sources in {"preferences": preferences, "judge-preferences": judge_preferences}.items():
        rows = read(sources, "prompt", "chosen", "rejected")
        pairs = [{"prompt": row["prompt"], **{key: answer(row[key]) for key in ("chosen", "rejected")}} for row in rows]
        kept = pl.DataFrame(pairs).filter(pl.col("chosen") != pl.col("rejected"))
        write(kept, output / f"{name}.parquet")
        counts[name] = kept.height
    return counts


def answer(value: Any) -> str:
    """A summary as text, with the space that follows `TL;DR:`; of chat messages the last one."""
    text = value if isinstance(value, str) else value[-1]["content"]
    return " " + text.strip()


def read(sources: list[str], *columns: str) -> list[dict[str, Any]]:
    """The rows of all sources. Raises UsageError where one lacks a column."""
    rows: list[dict[str, Any]] = []
    for source in sources:
        name, _, split = (source, "", "") if Path(source).exists() else source.partition("@")
        found = read_rows(name, split or None)
        if missing := [column for column in columns if column not in found.columns]:
            raise UsageError(f"{source} has no column {' or '.join(missing)}; it has {', '.join(found.columns)}")
        rows += found.rows
    return rows


def write(table: pl.DataFrame, path: Path) -> None:
    with writing_atomic(path) as file:
        table.write_parquet(file)


if __name__ == "__main__":
    main()
