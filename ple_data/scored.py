"""Rewards of answers under one or more reward models, each scored once and kept. Never samples."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ple_data.answers import Answers
from ple_data.progress import Progress
from ple_data.rewards import RewardModel, check_reward_model, load_reward_model
from ple_data.score_cache import Score, cached_scores, key_of
from schemas.errors import PleError, UsageError

NAMED_ROWS = 10
"""How many refused rows an error lists."""


def check_reward_models(specs: Sequence[str], options: Mapping[str, Any]) -> None:
    """Refuse reward models that cannot be used, before anything is sampled for them. Raises UsageError."""
    for spec in specs:
        check_reward_model(spec, options.get("output_index"))


def score_answers(
    answers: Sequence[Answers], specs: Sequence[str], output: Path, options: Mapping[str, Any]
) -> list[str]:
    """Append each model's reward to the list `rewards` of every row. Gives back the models' recorded names.

    specs, options: as `load_reward_model` takes them; one model is in memory at a time. Raises UsageError where two
    specs name the same model, and PleError for a reward that is not a finite number.
    """
    names: list[str] = []
    rows = [row for each in answers for row in each.rows]
    for row in rows:
        row["rewards"] = []
    for spec in specs:
        model = load_reward_model(spec, **options)
        if model.name in names:
            raise UsageError(f"--reward-model {spec} is given twice ({model.name}); give each once")
        names.append(model.name)
        for row, reward in zip(rows, _rewards(model, rows, output / "rewards"), strict=True):
            row["rewards"].append(reward)
        del model
    return names


def _rewards(model: RewardModel, rows: Sequence[Mapping[str, Any]], directory: Path) -> list[float]:
    keys = [key_of(row["x"], row["y"]) for row in rows]
    with Progress(f"score with {model.name}", len(set(keys)), "responses") as progress:

        def compute(places: list[int]) -> list[Score]:
            rewards = model.score([(rows[place]["x"], rows[place]["y"]) for place in places])
            _refuse_non_finite(model, [rows[place] for place in places], rewards)
            progress.advance(len(places))
            return [(reward, None) for reward in rewards]

        scores = cached_scores(directory, model.name, keys, compute)
        if model.truncated:
            progress.note(f"{model.truncated} texts are longer than it takes: the beginning of x was cut")
    return [value for value, _ in scores]


def _refuse_non_finite(model: RewardModel, rows: Sequence[Mapping[str, Any]], rewards: Sequence[float]) -> None:
    bad = [
        f"query {row['query_id']!r} sample {row['sample']} = {reward}"
        for row, reward in zip(rows, rewards, strict=True)
        if not math.isfinite(reward)
    ]
    if bad:
        more = f" and {len(bad) - NAMED_ROWS} more" if len(bad) > NAMED_ROWS else ""
        raise PleError(
            f"reward model {model.name} gave rewards that are not finite: {'; '.join(bad[:NAMED_ROWS])}{more}; "
            "correct the reward model and run the same command again"
        )
