"""What a result depends on, as it is kept beside it and compared when a command is started again.

It depends on the options that are not machine-only, on the digests of what they name, and on nothing else. An option
that an older record does not know counts as its default; a model, adapter or file that was moved or renamed is the
same one.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ple_data.common.digests import digests_of, text_digest
from ple_data.common.secrets import public
from schemas.errors import UsageError
from schemas.options import Options, about

DIGESTS = {
    **dict.fromkeys(("model", "adapter", "revision"), ("weights",)),
    "data": ("data_digest", "data_digests"),
    "queries": ("queries_digest",),
    "reward_model": ("reward",),
    "rubric": ("reward",),
}
"""Where the digest of what an option names is kept. Where there is none (a hub dataset), its name counts."""
FOR_PEOPLE = ("trl", "full", "reward_options")
"""What is kept and does not count, but where it is an option of the command."""
NO_OPTIONS = {"method", *itertools.chain(*DIGESTS.values())}
"""What counts beside the options."""


@dataclass(frozen=True)
class Settings:
    """The settings of one command; `values` are JSON.

    elsewhere: options whose content is compared by other means. chosen: the number type was not asked for.
    """

    kind: type[Options]
    values: dict[str, Any]
    elsewhere: Collection[str] = ()
    chosen: bool = False

    @classmethod
    def of(cls, options: Options, *, elsewhere: Collection[str] = (), **more: Any) -> Settings:
        """Those of a command's options that count, and `more` (`NO_OPTIONS`, or what is kept for people)."""
        return cls(type(options), counted(options) | {name: as_json(value) for name, value in more.items()}, elsewhere)

    def with_all(self) -> Settings:
        """The same, nothing being compared by other means."""
        return replace(self, elsewhere=())

    def differences(self, then: Mapping[str, Any]) -> list[str]:
        """Each setting that counts and differs from an older record's: 'name: old then, new now'."""
        known = {option.name: option for option in fields(self.kind)}
        then = {**then, **_of_rewards(then.get("reward_options"))}
        found = []
        for name in sorted(self.values.keys() | then.keys()):
            option = known.get(name)
            if name in self.elsewhere or (option is None and name in FOR_PEOPLE):
                continue
            if option is None and name not in NO_OPTIONS:
                found.append(f"{name}: {then.get(name)!r} then, an option that this command does not have")
                continue
            if option is not None and (about(option).machine or self._by_digest(name, then)):
                continue
            default = as_json(option.default) if option is not None else None
            now, before = self.values.get(name, default), then.get(name, default)
            if name == "weights" and now and before:
                now, before = digests_of(now), digests_of(str(before))
            if name == "reward" and now and before:  # 0.1.0 kept an address with what in its path may be a key
                now, before = public(now, text_digest), public(str(before), text_digest)
            if now != before and not (name == "precision" and before == "auto" and self.chosen):  # as 0.1.0 kept it
                found.append(f"{name}: {before!r} then, {now!r} now")
        return found

    def refuse_other(self, then: Mapping[str, Any], where: Path) -> None:
        """Raise UsageError that lists every setting that differs from those that `where` was made with."""
        if changes := self.differences(then):
            raise UsageError(
                f"{where} was made with other settings ({'; '.join(changes)}); use another --output, or --no-resume "
                "to start again"
            )

    def _by_digest(self, name: str, then: Mapping[str, Any]) -> bool:
        return any(self.values.get(digest) and then.get(digest) for digest in DIGESTS.get(name, ()))


def _of_rewards(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """How version 0.1.0 kept the options of a reward model: in one mapping, two of them under shorter names."""
    return {f"reward_{name}" if name in ("device", "dtype") else name: value for name, value in (options or {}).items()}


def counted(options: Options, always: Collection[str] = ()) -> dict[str, Any]:
    """The values, as JSON, of the options that are not machine-only.

    always: give those of these names in any case, and others only where they are not their defaults and name no place.
    So a digest over them stays what it was before there was another option.
    """
    found = {}
    for option in fields(options):
        value = getattr(options, option.name)
        told = about(option)
        later = bool(always) and (told.place or value == option.default)
        if option.name in always or not (told.machine or later):
            found[option.name] = as_json(value)
    return found


def as_json(value: Any) -> Any:
    """Paths as text, tuples as lists."""
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value
