"""Reward models: something that gives a number to (query x, response y), chosen by one text, the spec.

A reward model sees x and y and never the principle. Nothing here samples, trains or writes a file.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from schemas.options import Rewards


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


@dataclass(frozen=True)
class Kind:
    """A kind of reward model: which specs are its, and its module here.

    The module has `check(spec, output_index)`, which loads nothing, and `load(spec, options)`; where specs may hold
    something secret, `shown(spec)` for messages and `recorded(spec)` for files.
    """

    takes: Callable[[str], bool]
    module: str
    secret: bool = False


KINDS = (
    Kind(lambda spec: spec.startswith(("http://", "https://")), "endpoint", secret=True),
    Kind(lambda spec: ":" in spec and not Path(spec).exists(), "function"),
    Kind(lambda spec: True, "classifier"),
)
"""The first that takes a spec has it."""


def check_reward_model(spec: str, output_index: int | None = None) -> None:
    """Refuse, without loading a model or running a function, a spec that `load_reward_model` would refuse.

    Raises UsageError. An endpoint is not asked.
    """
    _module(spec).check(spec, output_index)


def shown_spec(spec: str) -> str:
    """The spec as messages show it: of an address nothing that may be secret. Raises UsageError for a wrong address."""
    return _without_secrets(spec, "shown")


def recorded_spec(spec: str) -> str:
    """The spec as files hold it: of an address's query only the digest. Raises UsageError for a wrong address."""
    return _without_secrets(spec, "recorded")


def load_reward_model(spec: str, options: Rewards | None = None) -> RewardModel:
    """The reward model that `spec` names.

    - `http://...` or `https://...`: an endpoint (ple_data/rewards/endpoint.py);
    - `file.py:function` or `module:function`: a Python function (ple_data/rewards/function.py);
    - a directory or a hub id: a sequence classifier (ple_data/rewards/classifier.py), whose output that is the
      reward may be named as in `sentiment[1]`. Only this kind uses the options.

    Raises UsageError where the spec names nothing usable.
    """
    model: RewardModel = _module(spec).load(spec, options or Rewards())
    return model


def _without_secrets(spec: str, how: str) -> str:
    if not _kind(spec).secret:
        return spec
    shown: str = getattr(_module(spec), how)(spec)
    return shown


def _kind(spec: str) -> Kind:
    return next(kind for kind in KINDS if kind.takes(spec))


def _module(spec: str) -> Any:
    return importlib.import_module(f"ple_data.rewards.{_kind(spec).module}")
