"""Rewards of answers under one or more reward models, each scored once and kept. Never samples."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ple_data.evaluation.answers import Answers
from ple_data.rewards import RewardModel, as_read, check_reward_model, load_reward_model, options_of, shown_spec
from ple_data.scoring.cache import Score, cached_scores, key_of
from schemas.errors import UsageError
from schemas.options import Judged
from schemas.reports import RewardModelUse


def check_reward_models(options: Judged) -> None:
    """Refuse reward models that cannot be used, before anything is sampled for them. Raises UsageError."""
    specs = options.reward_model
    for spec in options.trained_with:
        if spec not in specs:
            raise UsageError(
                f"--trained-with {shown_spec(spec)} must be one of the --reward-model options, word for word"
            )
    for at, (spec, how) in enumerate(zip(specs, options_of(specs, options), strict=True)):
        check_reward_model(spec, how)
        if spec in specs[:at]:
            raise UsageError(f"--reward-model {shown_spec(spec)} is given twice; give each once")


def score_answers(answers: Sequence[Answers], options: Judged, output: Path) -> list[RewardModelUse]:
    """Append each model's reward to the list `rewards` of every row. Gives back the models, by their recorded names.

    One model is in memory at a time. Raises UsageError where two specs name the same model, and PleError for a reward
    that is not a finite number.
    """
    uses: list[RewardModelUse] = []
    rows = [row for each in answers for row in each.rows]
    for row in rows:
        row["rewards"] = []
    for spec, how in zip(options.reward_model, options_of(options.reward_model, options), strict=True):
        model = load_reward_model(spec, how, output / "rewards" / "ratings")
        if model.name in [use.name for use in uses]:
            raise UsageError(f"--reward-model {model.name} is given twice, in two spellings; give each once")
        uses.append(RewardModelUse(name=model.name, trained=spec in options.trained_with))
        for row, reward in zip(rows, _rewards(model, answers, output / "rewards"), strict=True):
            row["rewards"].append(reward)
        del model
    return uses


def _rewards(model: RewardModel, answers: Sequence[Answers], directory: Path) -> list[float]:
    rows = [row for each in answers for row in each.rows]
    read = [x for each in answers for x in as_read(model, [row["x"] for row in each.rows], chat=each.chat)]
    texts = [(x, row["y"]) for x, row in zip(read, rows, strict=True)]

    def compute(places: list[int]) -> Iterator[list[tuple[int, Score]]]:
        for batch in model.stream([texts[place] for place in places]):
            yield [(at, (reward, None)) for at, reward in batch]

    scores = cached_scores(
        directory,
        model.name,
        [key_of(x, y) for x, y in texts],
        compute,
        label=f"score with {model.name}",
        unit="responses",
        names=[f"query {row['query_id']!r} sample {row['sample']}" for row in rows],
    )
    if model.truncated:
        print(
            f"{model.truncated} texts are longer than {model.name} takes: the beginning of x was cut", file=sys.stderr
        )
    return [value for value, _ in scores]
