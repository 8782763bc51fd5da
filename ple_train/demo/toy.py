"""The toy demo's folder: data from the grammar, a language model from nothing, the recipe. Never runs a round."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ple_data.inputs.principles import load_principle
from ple_train.demo import toyworld
from ple_train.demo.scratch import train_tokenizer, write_llama
from ple_train.demo.world import World, ple, text_of, write_missing
from schemas.options import Rewards

ROUNDS = 3
SEED = 0
TAU0, ALPHA = 0.2, 0.9
UNSEEN = 400
MAX_NEW_TOKENS = 80
QUERIES_PER_ROUND = 256
PRETRAINING, LABELLED, FINE_TUNING, HELD_OUT = 5000, 2400, 2600, 400


def world(output: Path, rounds: int) -> World:
    """Prepare the folder, and train its base model; what is there stays."""
    recipe = _write_world(output, rounds)
    files = ["--model", output / "untrained", "--data", output / "data" / "reviews.jsonl", "--output", output / "base"]
    ple("sft", *files, "--full", "--learning-rate", 2e-3, "--schedule", "cosine", "--warmup-steps", 20)
    reward, grammar = f"{output / 'run' / 'reward'}[1]", "ple_train.demo.toyworld"
    judges = [reward, f"{grammar}:polarity", f"{grammar}:grammatical"]
    return World(
        recipe=recipe,
        start=output / "run" / "sft",
        measured=(
            *("--queries", output / "data" / "unseen.jsonl", "--engine", "hf", "--max-new-tokens", MAX_NEW_TOKENS),
            *(word for judge in judges for word in ("--reward-model", judge)),
            *("--trained-with", reward, "--seed", SEED),
        ),
        columns={
            "reward:0": "reward model",
            "reward:1": "the grammar itself",
            "reward:2": "grammatical",
            "perplexity": "perplexity",
            "kl": "KL",
        },
        title="PLE on the toy review world",
        report=text_of("report.txt"),
        told=lambda: {"held_out": HELD_OUT, "right": f"{100 * _accuracy(output):.0f}"},
    )


def _write_world(output: Path, rounds: int) -> Path:
    """Data, untrained model and recipe; the same bytes each time, but of a recipe that is there already."""
    data = output / "data"
    every = toyworld.openings()
    unseen, seen = every[::5][:UNSEEN], [x for index, x in enumerate(every) if index % 5]
    principle = load_principle("imdb").text
    reviews = toyworld.reviews(SEED, seen)
    pretraining = list(itertools.islice(reviews, PRETRAINING))
    toyworld.write_rows(data / "reviews.jsonl", _texts(pretraining))
    toyworld.write_rows(data / "labels.jsonl", itertools.islice(_labelled(reviews), LABELLED))
    toyworld.write_rows(data / "unseen-labels.jsonl", itertools.islice(_labelled(reviews), HELD_OUT))
    plain = _texts(itertools.islice(reviews, FINE_TUNING // 2))
    praise = (r for r in reviews if r.polarity >= 0.5)
    guided = _texts(itertools.islice(praise, FINE_TUNING // 2), f"{principle}\n")
    toyworld.write_rows(data / "sft.jsonl", [*plain, *guided])
    toyworld.write_rows(data / "queries.jsonl", [{"x": x} for x in seen])
    references = [next(toyworld.reviews(SEED + 1 + at, [x])).body for at, x in enumerate(unseen)]
    toyworld.write_rows(
        data / "unseen.jsonl", [{"x": x, "reference": y} for x, y in zip(unseen, references, strict=True)]
    )
    if not (output / "untrained").exists():
        tokenizer = train_tokenizer([principle, *(review.text for review in pretraining)], 768)
        write_llama(output / ".untrained", tokenizer, hidden=128, layers=3, heads=4, positions=512, seed=SEED)
        (output / ".untrained").rename(output / "untrained")
    recipe = output / "recipe.yaml"
    quoted = json.dumps(str(output))[1:-1]
    settings = {"rounds": rounds, "queries": QUERIES_PER_ROUND, "seed": SEED, "tau0": TAU0, "alpha": ALPHA}
    write_missing(recipe, text_of("recipe.yaml").format(output=quoted, **settings))
    return recipe


def _texts(reviews: Iterable[toyworld.Review], before: str = "") -> list[dict[str, Any]]:
    return [{"x": before + review.opening, "y": review.body} for review in reviews]


def _labelled(reviews: Iterator[toyworld.Review]) -> Iterator[dict[str, Any]]:
    return ({"text": r.text, "label": int(r.polarity > 0)} for r in reviews if r.polarity != 0)


def _accuracy(output: Path) -> float:
    """Share of unseen labelled reviews that the reward model gets right."""
    from ple_data.rewards import load_reward_model

    rows = [json.loads(line) for line in (output / "data" / "unseen-labels.jsonl").read_text().splitlines()]
    texts = [("", row["text"]) for row in rows]
    blame, praise = (
        load_reward_model(str(output / "run" / "reward"), Rewards(output_index=i)).score(texts) for i in (0, 1)
    )
    found = [int(p > b) for b, p in zip(blame, praise, strict=True)]
    return sum(label == row["label"] for label, row in zip(found, rows, strict=True)) / len(rows)
