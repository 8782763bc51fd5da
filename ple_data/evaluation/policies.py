"""The policies of an evaluation as words on a command line: `NAME=MODEL[@REVISION][,ADAPTER]`. Loads nothing."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ple_data.common.digests import policy_name
from ple_data.common.models import check_adapter, check_model
from schemas.errors import UsageError

_LABEL = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class NamedPolicy:
    """A policy and what a table calls it (`label`); `name` is the one with digests, as in a store. `after_round`: the
    round whose training made it; None for a start policy, or where it is not known.
    """

    label: str
    model: str
    revision: str | None
    adapter: str | None
    name: str
    after_round: int | None = None


def named_policy(
    label: str, model: str, revision: str | None, adapter: str | None = None, after_round: int | None = None
) -> NamedPolicy:
    """The policy under its name with digests. Raises UsageError for a model or adapter that cannot be used."""
    check_model(model, quantized=True)  # an engine may read it; what does not says so when it loads
    if adapter:
        check_adapter(adapter, model)
    return NamedPolicy(label, model, revision, adapter, policy_name(model, adapter, revision), after_round)


def parse_policies(words: Sequence[str]) -> list[NamedPolicy]:
    """The policies in their order, checked and with their digests.

    MODEL is a directory or a hub id, which may end with `@` and a branch, tag or commit. Raises UsageError for a
    word of another form, a name that stands twice, or a model or adapter that cannot be used.
    """
    policies = [_parse(word) for word in words]
    labels = [policy.label for policy in policies]
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"--policy {label}=...: the name {label} stands twice; give each policy its own")
    return policies


def _parse(word: str) -> NamedPolicy:
    label, _, rest = word.partition("=")
    model, comma, adapter = rest.partition(",")
    if not (_LABEL.fullmatch(label) and model) or (comma and not adapter):
        raise UsageError(
            f"--policy {word!r} must be NAME=MODEL[,ADAPTER], such as sft=runs/sft or "
            "ple=runs/sft,runs/policy/round=004 (a name of letters, digits and . _ + -)"
        )
    revision = ""
    if not Path(model).exists():
        model, _, revision = model.partition("@")
    return named_policy(label, model, revision or None, adapter or None)
