"""A command's options for click, made from its dataclass in `schemas.options`. Runs no command."""

from collections.abc import Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from schemas.errors import UsageError
from schemas.options import About, Options, about, choices_of, flag, is_repeated, kind_of

_METAVARS = {click.IntRange: "N", click.FloatRange: "X"}


class SectionedOption(click.Option):
    """An option that --help shows under a heading."""

    section: str


def parameters_of(kind: type[Options]) -> list[click.Parameter]:
    """A click parameter for each option of a command."""
    return [_parameter(known) for known in kind.in_order() if about(known).offered]


def _parameter(known: "Field[Any]") -> click.Parameter:
    told, kind = about(known), kind_of(known)
    if told.positional:
        return click.Argument([known.name], type=_type(known, told))
    more: dict[str, Any] = {} if known.default in (MISSING, None, ()) else {"default": known.default}
    type_ = None if kind is bool else _type(known, told)
    option = SectionedOption(
        [told.names or _names(known), known.name],
        type=type_,
        is_flag=True if kind is bool else None,
        multiple=is_repeated(known),
        required=known.default is MISSING,
        help=told.help,
        metavar=_METAVARS.get(type(type_), told.metavar),
        **more,
    )
    option.section = told.section
    return option


def _names(known: "Field[Any]") -> str:
    word = flag(known)
    return f"{word}/--no-{word[2:]}" if kind_of(known) is bool else word


def _type(known: "Field[Any]", told: About) -> Any:
    kind = kind_of(known)
    if choices := choices_of(known):
        return click.Choice(choices)
    if kind is Path:
        return click.Path(path_type=Path)
    bounded = {told.least, told.above, told.most, told.below} != {None}
    if kind is int and bounded:
        least, most = (None if limit is None else int(limit) for limit in (told.least, told.most))
        return click.IntRange(least, most)
    if kind is float and bounded:
        low, high = (a if a is not None else b for a, b in ((told.least, told.above), (told.most, told.below)))
        return click.FloatRange(low, high, min_open=told.above is not None, max_open=told.below is not None)
    return kind


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
