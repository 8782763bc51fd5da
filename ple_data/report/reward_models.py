"""The reward models of a page under short titles, R1, R2, ..., and what is known of whether they trained a policy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ple_data.report.pairs import visible


@dataclass(frozen=True)
class RewardModel:
    """A reward model by its recorded name. `origin`: how it is known to have trained a policy, else empty."""

    short: str
    name: str
    origin: str

    @property
    def title(self) -> str:
        """What stands over its rewards."""
        return f"{self.short} (trained)" if self.origin else self.short

    @property
    def legend(self) -> str:
        """A sentence that says which it is."""
        origin = self.origin or "not marked as having trained a policy"
        return f"{self.short}: reward by {visible(self.name)}, {origin}."


def numbered(names: Iterable[str], marked: set[str], own: set[str]) -> dict[str, RewardModel]:
    """R1, R2, ... in the order of `names`, by name. `marked`: with --trained-with; `own`: those of the page's pairs."""

    def origin(name: str) -> str:
        if name in marked:
            return "which trained a policy"
        return "which scored the pairs of this run" if name in own else ""

    return {
        name: RewardModel(f"R{place}", name, origin(name)) for place, name in enumerate(dict.fromkeys(names), start=1)
    }
