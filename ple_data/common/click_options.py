"""A command's options for click, made from its dataclass in `schemas.options`. Runs no command."""

from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from schemas.errors import UsageError
from schemas.options import About, Options, about, choices_of, flag, is_repeated, kind_of


class SectionedOption(click.Option):
    """An option that --help shows under a heading."""

    def __init__(self, *args: Any, section: str = "Options", **more: Any) -> None:
        super().__init__(*args, **more)
        self.section = section
        if isinstance(self.type, click.IntRange | click.FloatRange):
            self.metavar = "N" if isinstance(self.type, click.IntRange) else "X"


class SectionedCommand(click.Command):
    """A command whose help groups its options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                sections.setdefault(getattr(parameter, "section", "Other"), []).append(record)
        for section in sorted(sections, key=lambda name: name == "Other"):
            with formatter.section(section):
                formatter.write_dl(sections[section])


def parameters_of(kind: type[Options]) -> list[click.Parameter]:
    """A click parameter for each option of a command."""
    return [_parameter(known) for known in kind.in_order() if about(known).offered]


def taking(kind: type[Options], function: Callable[[Any], Any]) -> Callable[..., Any]:
    """`function`, which takes the options as their dataclass, as a callback that click can call."""

    def callback(**values: Any) -> Any:
        return function(kind(**values))

    callback.__doc__ = function.__doc__
    return callback


def _parameter(known: "Field[Any]") -> click.Parameter:
    told = about(known)
    needed = known.default is MISSING
    if told.positional:
        return click.Argument([known.name], type=_type(known, told))
    default = None if needed or (is_repeated(known) and known.default == ()) else known.default
    more: dict[str, Any] = {} if needed or default is None else {"default": default}
    return SectionedOption(
        [told.names or _names(known), known.name],
        type=None if kind_of(known) is bool else _type(known, told),
        is_flag=True if kind_of(known) is bool else None,
        multiple=is_repeated(known),
        required=needed,
        help=told.help,
        metavar=told.metavar,
        section=told.section,
        **more,
    )


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
