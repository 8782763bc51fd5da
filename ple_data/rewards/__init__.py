"""Reward models: something that gives a number to (query x, response y), chosen by one text, the spec.

A reward model sees x and y and never the principle. Nothing here samples, trains or writes a file.
"""

import importlib
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ple_data.inputs.chat import as_chat, to_text
from ple_data.inputs.principles import NO_PRINCIPLE
from schemas.errors import UsageError
from schemas.options import Rewards

Key = TypeVar("Key")


class RewardModel(Protocol):
    """What every kind of reward model can do. x is a text, or a chat as JSON text (a list of {"role", "content"})."""

    name: str
    """What is recorded beside each reward: the spec's last part with a digest of what computes it."""

    truncated: int = 0
    """How many texts were cut to fit the model, so far."""

    runs_on: bool = False
    """Whether it reads x and y as one text."""

    @abstractmethod
    def stream(self, rows: Sequence[tuple[str, str]]) -> Iterator[list[tuple[int, float]]]:
        """(row, reward) of each (x, y), some at a time as they come, so that what was paid for can be kept.

        Rewards are in the model's own units (not checked for NaN or infinity). Raises PleError.
        """

    def score_each(self, jobs: Iterator[tuple[Key, Sequence[tuple[str, str]]]]) -> Iterator[tuple[Key, list[float]]]:
        """The rewards of each piece of work, as they come; the next one is asked for when there is room for it."""
        for key, rows in jobs:
            yield key, self.score(rows)

    def score(self, rows: Sequence[tuple[str, str]]) -> list[float]:
        """The same rewards, all of them, in order."""
        rewards = dict(item for batch in self.stream(rows) for item in batch)
        return [rewards[row] for row in range(len(rows))]


KINDS: dict[str, Callable[[str], bool]] = {
    "endpoint": lambda spec: spec.startswith(("http://", "https://")),
    "judge": lambda spec: spec.startswith("judge:"),
    "function": lambda spec: ":" in spec and not os.path.exists(spec),
    "classifier": lambda spec: True,
}
"""The kinds of reward models, each a module here, and which specs are theirs; the first that takes a spec has it.

The module has `check(spec, options)`, which loads nothing, and `load(spec, options)`; that of judges, whose answers are
paid for, `load(spec, options, keep)`. `takes(options)`, where there is one, gives those of `join` and `output_index`
that the kind has, as they are given. That of addresses, which may hold something secret, has `shown(spec)` for messages
and `recorded(spec)` for files.
"""


LENGTH_FIELDS = ("max_completion_tokens", "max_tokens")
"""Fields of a request that bound how long a judge's answer may be. They change no rating that there is."""


def as_read(model: RewardModel, xs: Sequence[str], *, chat: bool) -> list[str]:
    """x as a model is given it: one that runs on gets what was asked as a chat as one, to see where y begins."""
    return [to_text(as_chat(x)) for x in xs] if chat and model.runs_on else list(xs)


def kind_of(spec: str) -> str:
    """The kind of reward model that a spec is for."""
    return next(kind for kind, takes in KINDS.items() if takes(spec))


def rubric_of(specs: Sequence[str], rubric: str | None, principle: str | None) -> str | None:
    """What judges among the reward models of a run rate by: its rubric, else its principle.

    Raises UsageError where a judge has neither.
    """
    if rubric is not None or "judge" not in map(kind_of, specs):
        return rubric
    if principle in (None, NO_PRINCIPLE):
        raise UsageError("a judge rates by the principle, and there is none: give --rubric (in a recipe score.rubric)")
    return principle


def check_reward_model(spec: str, options: Rewards | None = None) -> None:
    """Raise UsageError for a spec that cannot be used. Loads no model, runs no function and asks no endpoint."""
    _module(spec).check(spec, options or Rewards())


def options_of(specs: Sequence[str], options: Rewards) -> list[Any]:
    """The options of each of several reward models: of --join and --output-index those that its kind has.

    Raises UsageError for one that is given and that none of them takes.
    """
    if len(specs) < 2:
        return [options] * len(specs)  # it says itself what it has no use for
    plain = {known.name: known.default for known in fields(Rewards) if known.name in ("join", "output_index")}
    given = {name for name, default in plain.items() if getattr(options, name) != default}
    taken: list[set[str]] = [getattr(_module(spec), "takes", lambda _: set())(options) & given for spec in specs]
    if unused := given.difference(*taken):
        flags = " and ".join(f"--{name.replace('_', '-')} {getattr(options, name)}" for name in sorted(unused))
        raise UsageError(f"{flags}: none of the reward models takes it; leave it out")
    return [options.but(**{name: plain[name] for name in given - own}) for own in taken]


def shown_spec(spec: str) -> str:
    """The spec as messages show it: of an address nothing that may be secret. Raises UsageError for a wrong address."""
    return _module(spec).shown(spec) if kind_of(spec) == "endpoint" else spec


def recorded_spec(spec: str) -> str:
    """The spec as files hold it: of an address's query only the digest. Raises UsageError for a wrong address."""
    return _module(spec).recorded(spec) if kind_of(spec) == "endpoint" else spec


def load_reward_model(spec: str, options: Rewards | None = None, keep: Path | None = None) -> RewardModel:
    """The reward model that `spec` names.

    - `http://...` or `https://...`: an endpoint (ple_data/rewards/endpoint.py);
    - `judge:MODEL`: a language model with a rubric (ple_data/rewards/judge.py), whose answers are kept in the folder
      `keep` where there is one;
    - `file.py:function` or `module:function`: a Python function (ple_data/rewards/function.py);
    - a directory or a hub id: a sequence classifier (ple_data/rewards/classifier.py), whose output that is the
      reward may be named as in `sentiment[1]`.

    Raises UsageError where the spec names nothing usable.
    """
    more = {"keep": keep} if kind_of(spec) == "judge" else {}
    return _module(spec).load(spec, options or Rewards(), **more)


def _module(spec: str) -> Any:
    return importlib.import_module(f"ple_data.rewards.{kind_of(spec)}")
