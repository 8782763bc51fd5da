"""Reward models: something that gives a number to (query x, response y), chosen by one text, the spec.

A reward model sees x and y and never the principle. Nothing here samples, trains or writes a file.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from schemas.options import Rewards

_ADDRESS = ("http://", "https://")
_OUTPUT = re.compile(r"\[(\d+)\]$")


class RewardModel(Protocol):
    """What every kind of reward model can do."""

    name: str
    """What is recorded beside each reward: the spec's last part with a digest of what computes it."""

    truncated: int
    """How many texts were cut to fit the model, so far."""

    def score(self, rows: Sequence[tuple[str, str]]) -> list[float]:
        """One reward for each (x, y), in order, in the model's own units (not checked for NaN or infinity).

        x is a text, or a chat as JSON text (a list of {"role", "content"}). Raises PleError.
        """
        ...

    def stream(self, rows: Sequence[tuple[str, str]]) -> Iterator[list[tuple[int, float]]]:
        """The same rewards as (row, reward), some at a time as they come, so that what was paid for can be kept."""
        ...


def check_reward_model(spec: str, output_index: int | None = None) -> None:
    """Refuse, without loading a model or running a function, a spec that `load_reward_model` would refuse.

    Raises UsageError. An endpoint is not asked.
    """
    if _is_classifier(spec):
        from ple_data.common.models import check_model, load_config
        from ple_data.rewards.classifier import choose_output

        model, output = _split_output(spec, output_index)
        check_model(model)
        choose_output(load_config(model), output, model)
    elif spec.startswith(_ADDRESS):
        shown_spec(spec)
    else:
        from ple_data.rewards.function import check_function

        check_function(spec)


def shown_spec(spec: str) -> str:
    """The spec as messages show it: of an address nothing that may be secret. Raises UsageError for a wrong address."""
    if not spec.startswith(_ADDRESS):
        return spec
    from ple_data.common.web import checked_url, shown_url
    from ple_data.rewards.endpoint import API_KEY_VARIABLE

    return shown_url(checked_url(spec, "reward model", API_KEY_VARIABLE))


def recorded_spec(spec: str) -> str:
    """The spec as files hold it: of an address's query only the digest. Raises UsageError for a wrong address."""
    if not spec.startswith(_ADDRESS):
        return spec
    from ple_data.rewards.endpoint import recorded_address

    return recorded_address(spec)


def load_reward_model(spec: str, options: Rewards | None = None) -> RewardModel:
    """The reward model that `spec` names.

    - `http://...` or `https://...`: an endpoint (ple_data/rewards/endpoint.py);
    - `file.py:function` or `module:function`: a Python function (ple_data/rewards/function.py);
    - a directory or a hub id: a sequence classifier (ple_data/rewards/classifier.py), whose output that is the
      reward may be named as in `sentiment[1]`. Only this kind uses the options: the output for a spec that names
      none, how x and y are joined, the token budget of a batch (padding counted), the device and the number type.

    Raises UsageError where the spec names nothing usable.
    """
    if _is_classifier(spec):
        from ple_data.rewards.classifier import DEFAULT_BATCH_TOKENS, ClassifierReward

        options = options or Rewards()
        model, output = _split_output(spec, options.output_index)
        return ClassifierReward(
            model,
            output_index=output,
            join=options.join,
            batch_tokens=options.batch_tokens or DEFAULT_BATCH_TOKENS,
            device=options.reward_device,
            dtype=options.reward_dtype,
        )
    if spec.startswith(_ADDRESS):
        from ple_data.rewards.endpoint import HttpReward

        return HttpReward(spec)
    from ple_data.rewards.function import FunctionReward

    return FunctionReward(spec)


def _is_classifier(spec: str) -> bool:
    return not spec.startswith(_ADDRESS) and (":" not in spec or Path(spec).exists())


def _split_output(spec: str, output_index: int | None) -> tuple[str, int | None]:
    found = _OUTPUT.search(spec)
    return (spec[: found.start()], int(found.group(1))) if found and not Path(spec).exists() else (spec, output_index)
