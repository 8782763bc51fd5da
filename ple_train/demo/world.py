"""What a demo shows: a recipe, and how its policies are measured; and how a demo calls a command. Knows no demo."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ple_data.common.command import say
from ple_train.run.child import run_child
from ple_train.run.rounds import find_program, refuse_failure
from schemas.files import write_atomic


@dataclass(frozen=True)
class World:
    """One demo, prepared in its folder.

    start: the model that round 0 begins with. measured: words of `ple eval` beside the policies. columns: heading by
    metric, `reward:N` for the Nth --reward-model. report: the closing text, with {pairs}, {unseen}, {before}, {after},
    {gains}, {curve}, {output} and what `told`, called after the run, gives.
    """

    recipe: Path
    start: Path
    measured: tuple[object, ...]
    columns: Mapping[str, str]
    title: str
    report: str
    told: Callable[[], Mapping[str, object]] = dict


def ple(*words: object) -> None:
    """Run a command as a child that shows its messages, as a shell would. Raises PleError where it fails."""
    command = [find_program("ple"), *(str(word) for word in words)]
    say(f"demo: {shlex.join(command)}")
    refuse_failure(f"ple {words[0]}", run_child(command).code)


def write_missing(path: Path, text: str) -> None:
    """Write a file that is not there yet: what its user has changed stays."""
    if not path.exists():
        write_atomic(path, text)


def text_of(name: str) -> str:
    """A text file of this folder."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
