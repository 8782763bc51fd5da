"""What each objective on pairs asks for, and which options go with it. The losses are in `ple_train.objectives`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

ObjectiveName = Literal["ple", "ple-residual", "dpo", "ipo", "rebel", "apo", "topr", "qrpo"]
Form = Literal["sums", "means"]


@dataclass(frozen=True)
class ObjectiveKind:
    """betas: the forms that it has, the first one its own, each with the beta that is taken where none is given (None:
    it has no beta). linear: its coefficients depend on the stored row alone. start: it needs the start policy.
    quantiles: it needs several plain responses to a query. stops: a pair comes to rest where its Delta is its margin /
    beta. sets: it knows the rank set and weighted SFT.
    """

    betas: Mapping[Form, float | None]
    linear: bool = False
    start: bool = True
    quantiles: bool = False
    stops: bool = False
    sets: bool = False

    @property
    def form(self) -> Form:
        """Its own form."""
        return next(iter(self.betas))


BY_PREFERENCE: Mapping[Form, float | None] = {"sums": 0.1, "means": 3.0}
OBJECTIVE_KINDS: dict[ObjectiveName, ObjectiveKind] = {
    "ple": ObjectiveKind({"sums": None}, linear=True, start=False, sets=True),
    "ple-residual": ObjectiveKind({"sums": 0.05, "means": 3.0}, stops=True, sets=True),
    "dpo": ObjectiveKind(BY_PREFERENCE),
    "ipo": ObjectiveKind(BY_PREFERENCE),
    "rebel": ObjectiveKind(BY_PREFERENCE, stops=True),
    "apo": ObjectiveKind(BY_PREFERENCE),
    "topr": ObjectiveKind({"sums": None}),
    "qrpo": ObjectiveKind({"sums": 0.1, "means": 1.0}, quantiles=True),
}


def misfit(train: Any) -> str | None:
    """What is wrong with options of `ple-train` that do not go together, in one sentence; None where all do."""
    name, kind = train.objective, OBJECTIVE_KINDS[train.objective]
    if train.stable and name != "ple":
        return f"--stable is for the printed loss; --objective {name} has its brake in --beta"
    if train.full and (kind.start or train.stable or train.trust_region is not None):
        asked = f"--objective {name}" if kind.start else "--stable" if train.stable else "--trust-region"
        return f"{asked} needs the start policy at hand: the model with its adapter off, so not with --full"
    form = train.form or kind.form
    wrong = {
        "--beta": train.beta is not None and kind.betas.get(form) is None,
        f"--form {form}": form not in kind.betas or (train.form is not None and kind.linear),
        "--label-smoothing": bool(train.label_smoothing) and name != "dpo",
        "--normalize-wsft": train.normalize_wsft and not kind.linear,
        "--sft-anchor": bool(train.sft_anchor) and not kind.linear,
        "--without": bool(train.without) and not kind.sets,
    }
    for option in (option for option, is_wrong in wrong.items() if is_wrong):
        return f"--objective {name} has no {option}: leave it out, or take another objective"
    return None
