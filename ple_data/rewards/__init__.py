"""Reward models: something that gives a number to (query x, response y), chosen by one text, the spec.

A reward model sees x and y and never the principle. Nothing here samples, trains or writes a file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

Join = Literal["auto", "text", "pair", "chat"]


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


def check_reward_model(spec: str, output_index: int | None = None) -> None:
    """Refuse, without loading a model or running a function, a spec that `load_reward_model` would refuse.

    Raises UsageError. An endpoint is not asked.
    """
    if spec.startswith(("http://", "https://")):
        return
    if ":" in spec and not Path(spec).exists():
        from ple_data.rewards.function import check_function

        check_function(spec)
        return
    from ple_data.models import check_model, load_config
    from ple_data.rewards.classifier import choose_output

    check_model(spec)
    choose_output(load_config(spec), output_index, spec)


def load_reward_model(
    spec: str,
    *,
    output_index: int | None = None,
    join: Join = "auto",
    batch_tokens: int | None = None,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> RewardModel:
    """The reward model that `spec` names.

    - `http://...` or `https://...`: an endpoint (ple_data/rewards/http.py);
    - `file.py:function` or `module:function`: a Python function (ple_data/rewards/function.py);
    - a directory or a hub id: a sequence classifier (ple_data/rewards/classifier.py). Only this kind uses
      the options: the output that is the reward, how x and y are joined, the token budget of a batch
      (padding counted), the device and the number type.

    Raises UsageError where the spec names nothing usable.
    """
    if spec.startswith(("http://", "https://")):
        from ple_data.rewards.http import HttpReward

        return HttpReward(spec)
    if ":" in spec and not Path(spec).exists():
        from ple_data.rewards.function import FunctionReward

        return FunctionReward(spec)
    from ple_data.rewards.classifier import DEFAULT_BATCH_TOKENS, ClassifierReward

    return ClassifierReward(
        spec,
        output_index=output_index,
        join=join,
        batch_tokens=batch_tokens or DEFAULT_BATCH_TOKENS,
        device=device,
        dtype=dtype,
    )
