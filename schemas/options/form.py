"""What an option is: a field of a frozen dataclass that says its default, bounds, help and heading. States none."""

import inspect
import re
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, TypeVar, Union, dataclass_transform, get_args, get_origin

from schemas.errors import UsageError


@dataclass(frozen=True)
class About:
    """What a field says of its option.

    above, below: bounds that are not allowed themselves. machine: it does not change what is learned or sampled, beyond
    rounding. place: a path or hub id, whose content counts (by its digest) and not where it lies. names: on the command
    line, where they are not made from the field's name: `--on/--off`, or several that mean the same. positional:
    an argument, not an option. offered: False where the command has one value of it and no option.
    """

    help: str
    section: str = "Options"
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    machine: bool = False
    place: bool = False
    names: str | None = None
    metavar: str | None = None
    positional: bool = False
    offered: bool = True


def option(default: Any, help: str, section: str = "Options", **about: Any) -> Any:
    """A dataclass field that is an option; `default` is MISSING where it must be given."""
    return field(default=default, metadata={"about": About(help, section, **about)})


def about(known: "Field[Any]") -> About:
    """What a field of these dataclasses says of its option."""
    found: About = known.metadata["about"]
    return found


def flag(known: "Field[Any]") -> str:
    """The option's name on the command line."""
    names = about(known).names
    return re.split("[/ ]", names)[0] if names else "--" + known.name.replace("_", "-")


def kind_of(known: "Field[Any]") -> Any:
    """The type of one value: of `tuple[Path, ...] | None` and of `Path | None` it is Path."""
    kind = known.type
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    return get_args(kind)[0] if get_origin(kind) is tuple else kind


def choices_of(known: "Field[Any]") -> tuple[str, ...]:
    """The values that it may have; none where it is free."""
    kind = kind_of(known)
    return get_args(kind) if get_origin(kind) is Literal else ()


def is_repeated(known: "Field[Any]") -> bool:
    """Whether the option may be given several times."""
    return get_origin(known.type) is tuple


O = TypeVar("O", bound="Options")  # noqa: E741


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclass(frozen=True)
class Options:
    """Options of a command or of a part of it. A subclass is a frozen dataclass, made with keywords alone.

    Raises UsageError for a value that its option does not take.
    """

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        for known in self.in_order():
            given = getattr(self, known.name)
            values = given if is_repeated(known) else [given]
            if kind_of(known) is Path and "" in values:
                raise UsageError(f"{flag(known)} must not be an empty text")
            if kind_of(known) is Path:
                values = [Path(value) if isinstance(value, str) else value for value in values]
            for value in values:
                _check(known, value)
            object.__setattr__(self, known.name, tuple(values) if is_repeated(known) else values[0])

    @classmethod
    def in_order(cls) -> "list[Field[Any]]":
        """Its options as help shows them: those of its groups from left to right, then its own."""
        all_of_it = {known.name: known for known in fields(cls)}
        names = [known.name for group in cls.__bases__ if issubclass(group, Options) for known in group.in_order()]
        names += inspect.get_annotations(cls)
        return [all_of_it[name] for name in dict.fromkeys(names)]

    def part(self, kind: type[O]) -> O:
        """Its options of one group alone."""
        return kind(**{known.name: getattr(self, known.name) for known in fields(kind)})

    def values(self) -> dict[str, Any]:
        """Its values by name."""
        return {known.name: getattr(self, known.name) for known in fields(self)}

    def but(self, **changed: Any) -> Self:
        """The same with other values."""
        return type(self)(**(self.values() | changed))


def _check(known: "Field[Any]", value: Any) -> None:
    if value is None:
        return
    limits, kind = about(known), kind_of(known)
    if (choices := choices_of(known)) and value not in choices:
        raise UsageError(f"{flag(known)} must be one of {', '.join(choices)}, not {value}")
    if value == "" and is_repeated(known):
        raise UsageError(f"{flag(known)} must not be an empty text")
    text = str(value) if isinstance(value, str | Path) else ""
    if not text.isascii() and text != text.encode(errors="replace").decode():
        raise UsageError(f"{flag(known)} holds bytes that are no UTF-8 text; no file of ours could keep them")
    if kind not in (int, float) or isinstance(value, bool):
        return
    checks = {
        f"at least {limits.least}": limits.least is None or value >= limits.least,
        f"above {limits.above}": limits.above is None or value > limits.above,
        f"at most {limits.most}": limits.most is None or value <= limits.most,
        f"below {limits.below}": limits.below is None or value < limits.below,
        "a finite number": value - value == 0,
    }
    if failed := [words for words, holds in checks.items() if not holds]:
        raise UsageError(f"{flag(known)} must be {' and '.join(failed)}, not {value}")
