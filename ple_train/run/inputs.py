"""What the stages of a recipe read, looked for before the first of them starts. Opens no model and asks no hub."""

import os
from collections.abc import Collection

from ple_data.common.models import check_model
from ple_data.inputs.principles import load_principle
from ple_data.inputs.readers import is_file
from ple_data.rewards import check_reward_model, kind_of, options_of, rubric_of
from ple_data.rewards.classifier import split_output
from schemas.errors import UsageError
from schemas.options import Rewards
from schemas.recipe import Recipe, named_words


def refuse_missing(recipe: Recipe, stages: Collection[str]) -> None:
    """stages: the names of those that are still to be done. Raises UsageError for what one of them will not find."""
    if recipe.reward and "reward" in stages:
        check_model(recipe.reward.model)
        is_file(recipe.reward.data)
    if recipe.sft and "sft" in stages:
        is_file(recipe.sft.data)
    if "sft" in stages or (stages and not recipe.sft):
        check_model(recipe.model, quantized=True)  # an engine may read it; what does not says so when it loads
    if "gen" in stages:
        is_file(recipe.queries)
        load_principle(recipe.principles)
        if missing := [path for path in recipe.reuse if not os.path.isdir(path)]:
            raise UsageError(f"reuse: {missing[0]} is no folder here; give the DATA of an earlier run")
    if "score" in stages:
        for spec, how in zip(recipe.reward_models, options_of(recipe.reward_models, _rewards(recipe)), strict=True):
            if kind_of(spec) == "classifier":
                check_model(split_output(spec, None)[0])
            else:
                check_reward_model(spec, how)
        if recipe.score.rubric is not None:
            load_principle(recipe.score.rubric)


def _rewards(recipe: Recipe) -> Rewards:
    """How its reward models read, as the command line says it to ple-score."""
    values = {known.name: getattr(recipe.score, known.name) for known in Rewards.in_order()}
    values["rubric"] = rubric_of(recipe.reward_models, recipe.score.rubric, recipe.principles)
    return Rewards(**values | {"reward_arg": tuple(named_words(recipe.score.reward_arg))})
