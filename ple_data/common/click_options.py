"""A command's options for click, made from its dataclass in `schemas.options`. Runs no command."""

from collections.abc import Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from schemas.errors import UsageError
from schemas.options import Options, about, choices_of, flag, is_repeated, kind_of

_METAVARS = {click.IntRange: "N", click.FloatRange: "X"}


class FilePath(click.Path):
    """A path; an empty text, such as of a variable that is not set, is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("must not be an empty text", param, ctx)
        return super().convert(value, param, ctx)


class SectionedOption(click.Option):
    """An option that --help shows under a heading."""

    section: str


def parameters_of(kind: type[Options]) -> list[click.Parameter]:
    """A click parameter for each option of a command."""
    return [_parameter(known) for known in kind.in_order() if about(known).offered]


def _parameter(known: "Field[Any]") -> click.Parameter:
    told, kind, word = about(known), kind_of(known), flag(known)
    if told.positional:
        many = is_repeated(known)
        return click.Argument(
            [known.name], type=_type(known), nargs=-1 if many else 1, required=True, metavar=told.metavar
        )
    default: dict[str, Any] = {} if known.default in (MISSING, None, ()) else {"default": known.default}
    type_ = None if kind is bool else _type(known)
    option = SectionedOption(
        [*(told.names or (f"{word}/--no-{word[2:]}" if kind is bool else word)).split(), known.name],
        type=type_,
        is_flag=True if kind is bool else None,
        multiple=is_repeated(known),
        required=known.default is MISSING,
        help=told.help,
        metavar=_METAVARS.get(type(type_), told.metavar),
        **default,
    )
    option.section = told.section
    return option


def _type(known: "Field[Any]") -> Any:
    told, kind = about(known), kind_of(known)
    if choices := choices_of(known):
        return click.Choice(choices)
    if kind is Path:
        return FilePath(path_type=Path)
    if kind not in (int, float) or {told.least, told.above, told.most, told.below} == {None}:
        return kind
    low = told.least if told.above is None else told.above
    high = told.most if told.below is None else told.below
    limits: Any = click.IntRange if kind is int else click.FloatRange
    return limits(low, high, min_open=told.above is not None, max_open=told.below is not None)


def refuse_given(sections: Sequence[str], why: str, *names: str) -> None:
    """Refuse options on the command line that would not be heeded: those under some headings, and others by name."""
    ctx = click.get_current_context()
    given = [
        parameter.opts[0]
        for parameter in ctx.command.params
        if (getattr(parameter, "section", None) in sections or parameter.name in names)
        and ctx.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    ]
    if given:
        raise UsageError(f"{', '.join(given)}: not heeded {why}; leave {'it' if len(given) == 1 else 'them'} out")
