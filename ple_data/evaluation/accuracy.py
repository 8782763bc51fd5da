"""How often a reward model is right on held-out preferences or labels, beside the simplest rule that knows no model.

Of preferences that rule is "longer wins", of labels the most frequent one. Trains nothing and samples nothing.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ple_data.common.progress import Progress
from ple_data.common.terminal import printable, text_table
from ple_data.evaluation.intervals import bootstrap
from ple_data.inputs.columns import PREFERENCES, column, labels
from ple_data.inputs.readers import read_rows
from ple_data.rewards import kind_of, load_reward_model, shown_spec
from schemas.errors import PleError, UsageError
from schemas.options import RewardTest
from schemas.reports import Estimate

LONGER, FREQUENT = "longer wins", "most frequent label"


@dataclass(frozen=True)
class HeldOut:
    """Rows to measure on.

    rows: (x, y) to score: of preferences all chosen ones, then all rejected ones; of labels ("", text). queries: what
    is drawn together. simple: how right the simple rule is on each row: 1, 0, or 0.5 of a tie.
    """

    source: str
    rows: list[tuple[str, str]]
    queries: list[str]
    groups: list[str]
    labels: list[int] | None
    simple: list[float]

    def only(self, places: Sequence[int]) -> "HeldOut":
        """Some of its preferences: those at these places."""
        count = len(self.queries)
        return replace(
            self,
            rows=[self.rows[place + side] for side in (0, count) for place in places],
            queries=[self.queries[place] for place in places],
            groups=[self.groups[place] for place in places] if self.groups else [],
            simple=[self.simple[place] for place in places],
        )

    @property
    def rule(self) -> str:
        return LONGER if self.labels is None else FREQUENT


@dataclass(frozen=True)
class Accuracy:
    """Of one group of rows, or of all: shares between 0 and 1 with their intervals over queries."""

    group: str
    rows: int
    right: Estimate
    simple: Estimate
    difference: Estimate

    @property
    def beats(self) -> bool:
        """Whether the interval of the difference on the same rows lies above 0."""
        return self.difference.count > 1 and self.difference.low > 0


def read_held_out(path: Path, group: str | None = None) -> HeldOut:
    """Columns prompt, chosen, rejected, or text, label; by the column `group` (`subset` where it is not given and
    there is one, as in RewardBench). Raises UsageError for what a row lacks.
    """
    rows = read_rows(path)
    by = group or ("subset" if "subset" in rows.columns else None)
    groups = [str(value) for value in column(rows, by, of=object)] if by else []
    if set(PREFERENCES) <= set(rows.columns):
        prompts, chosen, rejected = (column(rows, name) for name in PREFERENCES)
        simple = [right(len(good), len(bad)) for good, bad in zip(chosen, rejected, strict=True)]
        pairs = [(x, y) for side in (chosen, rejected) for x, y in zip(prompts, side, strict=True)]
        return HeldOut(rows.source, pairs, prompts, groups, None, simple)
    found, texts = labels(rows), column(rows, "text", "x")
    [(most, _)] = Counter(found).most_common(1)
    return HeldOut(
        rows.source, [("", text) for text in texts], texts, groups, found, [float(label == most) for label in found]
    )


def right(chosen: float, rejected: float) -> float:
    """1 where the chosen one has more, 0 where the other one has, 0.5 where both have the same."""
    return float(chosen > rejected) + 0.5 * float(chosen == rejected)


def measure(spec: str, held_out: HeldOut, options: RewardTest, keep: Path | None = None) -> str:
    """What `ple reward --test` prints of a reward model. keep: the folder of a judge's answers.

    Raises UsageError where it does not give what is measured, PleError where a reward is no finite number. A pair that
    a judge has not rated is left out and counted.
    """
    as_json = options.as_json
    if held_out.labels is not None:
        name, scores = _labelled(spec, held_out, held_out.labels, options)
        return _shown(name, held_out, accuracies(held_out, scores), as_json=as_json)
    model = load_reward_model(spec, options, keep)
    rewards = _all_of(model.stream(held_out.rows), held_out).reshape(2, -1)
    unrated = np.isnan(rewards).any(axis=0) if kind_of(spec) == "judge" else np.zeros(rewards.shape[1], bool)
    rated = np.flatnonzero(~unrated).tolist()
    _refuse_non_finite(model.name, rewards[:, rated], held_out)
    if not len(rated):
        raise PleError(f"{model.name} rated both responses of no pair of {held_out.source}")
    scores = [right(chosen, rejected) for chosen, rejected in rewards[:, rated].T]
    test = held_out.only(rated)
    return _shown(model.name, test, accuracies(test, scores), as_json=as_json, unrated=int(unrated.sum()))


def _labelled(spec: str, held_out: HeldOut, labels: Sequence[int], options: RewardTest) -> tuple[str, list[float]]:
    """A classifier's name, and whether its likeliest output is each row's label."""
    if kind_of(spec) != "classifier":
        raise UsageError(f"{held_out.source} has labels, which {shown_spec(spec)} does not give; test on pairs")
    from ple_data.rewards.classifier import ClassifierReward, outputs_of

    model, count = outputs_of(spec)
    if count == 1 or max(labels) >= count:
        raise UsageError(
            f"{held_out.source} has labels up to {max(labels)}, and {spec} has {count} outputs: give pairs "
            "(prompt, chosen, rejected), or a classifier of these labels"
        )
    classifier = ClassifierReward(f"{model}[0]", options.but(output_index=None))
    name = classifier.name.replace("[0]", "")
    logits = _all_of(classifier.logits(held_out.rows), held_out)
    _refuse_non_finite(name, logits.T, held_out)
    return name, (logits.argmax(axis=1) == labels).astype(float).tolist()


def _all_of(stream: Iterable[list[tuple[int, Any]]], held_out: HeldOut) -> np.ndarray:
    """What a reward model gives to each row, in their order."""
    found: dict[int, Any] = {}
    with Progress("measure", len(held_out.rows), "texts") as progress:
        for batch in stream:
            found.update(batch)
            progress.advance(len(batch))
    return np.array([found[row] for row in range(len(held_out.rows))])


def _refuse_non_finite(name: str, values: np.ndarray, held_out: HeldOut) -> None:
    """values: a column for each of the test's rows."""
    finite = np.isfinite(values).all(axis=0)
    if not finite.all():
        place = int(np.argmin(finite)) + 1
        raise PleError(f"reward model {name} gave no finite number for row {place} of {held_out.source}")


def accuracies(held_out: HeldOut, scores: Sequence[float]) -> list[Accuracy]:
    """One for each group by name, where there are some, and one for all rows. scores: 1, 0.5 or 0 a row."""
    everything = np.arange(len(scores))
    parts = {name: everything[np.array(held_out.groups) == name] for name in sorted(set(held_out.groups))}
    return [_accuracy(name, held_out, scores, places) for name, places in [*parts.items(), ("all", everything)]]


def _accuracy(name: str, held_out: HeldOut, scores: Sequence[float], places: np.ndarray) -> Accuracy:
    numbers: dict[str, int] = {}
    query = np.array([numbers.setdefault(held_out.queries[place], len(numbers)) for place in places])
    counts = np.bincount(query)

    def share(values: np.ndarray) -> Estimate:
        sums = np.bincount(query, values[places])
        return bootstrap(lambda drawn: sums[drawn].sum(axis=-1) / counts[drawn].sum(axis=-1), len(counts))

    found, simple = np.asarray(scores), np.asarray(held_out.simple)
    return Accuracy(name, len(places), share(found), share(simple), share(found - simple))


def _shown(name: str, held_out: HeldOut, found: Sequence[Accuracy], *, as_json: bool, unrated: int = 0) -> str:
    rule, total = held_out.rule, found[-1]
    if as_json:
        groups = [
            {"group": each.group, "rows": each.rows, "beats": each.beats}
            | {what: getattr(each, what).model_dump() for what in ("right", "simple", "difference")}
            for each in found
        ]
        whole = {"reward_model": name, "test": held_out.source, "beside": rule, "unrated": unrated, "groups": groups}
        return json.dumps(whole, indent=1)
    what = "pairs" if held_out.labels is None else "texts"
    rows = [
        [printable(each.group), each.rows, _percent(each.right), _percent(each.simple), _percent(each.difference, "+")]
        for each in found
    ]
    lines = [
        f"{printable(name)} on {total.rows} {what} of {printable(held_out.source)}",
        *([f"{unrated} more pairs have a response without a rating, and are left out"] if unrated else []),
        "right in % (a tie is half) [95 % interval over queries]",
        "",
        *text_table(["group", what, "reward model", rule, "difference"], rows, left=1),
        "",
    ]
    verdict = "beats" if total.beats else "does not beat"
    lies = "lies above 0" if total.beats else "does not lie above 0"
    return "\n".join([*lines, f'{verdict} "{rule}": the interval of the difference on the same rows {lies}'])


def _percent(share: Estimate, sign: str = "") -> str:
    value, low, high = (f"{100 * part:{sign}.1f}" for part in (share.mean, share.low, share.high))
    return f"{value} [{low}, {high}]"
