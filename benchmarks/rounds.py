"""What does a round cost before it does any work?

A random model of the demo's size samples a few tokens to a few queries, so nearly all of the time is process starts,
imports and model loads.

    python -m benchmarks.rounds --rounds 3
"""

import argparse
import contextlib
import json
import shutil
import statistics
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.score import write_reward_model
from benchmarks.side_by_side import made_with, seconds_of, timed_in_turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_models(place)
        seconds = timed_in_turns({"run": partial(run, place, options.rounds)}, options.repeats)["run"]
    print(made_with("torch", "transformers", "peft"))
    each = statistics.median(seconds) / options.rounds
    print(f"{each:.1f} s a round [{min(seconds):.1f} to {max(seconds):.1f} s in all]")


def write_models(place: Path) -> None:
    from ple_train.demo.scratch import train_tokenizer, write_llama

    rows = [{"id": f"q{n}", "x": f"the story of scene {n} was"} for n in range(4)]
    (place / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer([row["x"] for row in rows] * 50, 512, longest=256)
    write_llama(place / "model", tokenizer, hidden=128, layers=4, heads=2, positions=256)
    write_reward_model(place / "reward", 128, 4, [row["x"] for row in rows] * 50)


def run(place: Path, rounds: int) -> float:
    """Seconds of the whole run."""
    from ple_train.run.rounds import run as run_recipe
    from schemas.recipe import parse_recipe

    shutil.rmtree(place / "run", ignore_errors=True)
    recipe = {
        "model": str(place / "model"),
        "queries": str(place / "queries.jsonl"),
        "principles": "imdb",
        "reward_model": str(place / "reward"),
        "run_dir": str(place / "run"),
        "rounds": rounds,
        "gen": {"engine": "hf", "max_new_tokens": 2},
    }
    with contextlib.redirect_stderr(None):
        return seconds_of(partial(run_recipe, parse_recipe(recipe, "benchmark")))


if __name__ == "__main__":
    main()
