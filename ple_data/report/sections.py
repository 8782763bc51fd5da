"""The sections of the report: which figures and tables they have, and a word where something is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

from ple_data.common.secrets import public
from ple_data.evaluation.purity_text import L_BIAS, policy_table, steps_down
from ple_data.partition import reward_statistics, round_statistics, warnings
from ple_data.report import figures, reading, svg
from ple_data.report import round_tables as statistics
from ple_data.report.evaluation import evaluations, judged
from ple_data.report.pairs import visible
from ple_data.report.section import Section, Table, label
from ple_data.report.sources import Sources
from ple_data.report.training import training
from schemas.reports import PurityReport


def sections(sources: Sources) -> list[Section]:
    """All sections but the pairs and the cases, in the order of the page."""
    with svg.style():
        return [section for made in SECTIONS for section in made(sources)]


def _of_pairs(sources: Sources) -> Iterator[Section]:
    """Rewards, margins and lengths of the pairs."""
    pairs, tau0, alpha = sources.store.scan("pairs"), sources.tau0, sources.alpha
    sets = sources.sets
    rows = statistics.rounds(pairs, tau0, alpha)
    rewards = Section("rewards", "Rewards by round")
    if not rows:
        rewards.missing.append("No pairs yet: ple-gen samples responses, ple-score makes pairs of them.")
        yield rewards
        return
    rewards.draw(
        "rewards",
        "Mean reward by round",
        "Rewards of the pairs that each round's policy sampled (Figure 3 of the paper), with 95 % intervals.",
        figures.rewards(rows),
        reading.rewards(rows),
    )
    rewards.draw(
        "gap",
        "Gap and threshold by round" if sets else "Gap by round",
        "Mean of s_prompt − s with its 95 % interval." + (" A pair above τ_t is in the rank set." if sets else ""),
        figures.gap(rows, sets),
        reading.gap(rows, sets),
    )
    rewards.tables.append(_round_table(rows, sets))
    if own := reward_statistics(pairs, sources.store.reward_models()):
        rewards.tables.append(_reward_table(own))
    yield rewards

    margins = Section("margins", "Margins and the rank set" if sets else "Margins")
    if sets:
        margins.words += [f"Warning: {message}" for message in warnings(round_statistics(pairs, tau0, alpha))]
    if sources.use_of_sets:
        margins.words.append(f"Trained by {sources.method}: {'; '.join(sources.use_of_sets)}.")
    some = "" if len(rows) <= figures.MOST_ROWS else f" {figures.MOST_ROWS} of {len(rows)} rounds."
    margins.draw(
        "margins",
        "Margins by round",
        f"How many pairs have which margin{'; the dashed line is the round’s τ_t' if sets else ''}. The outer bars "
        f"hold what lies beyond the 0.5 % and 99.5 % quantiles.{some}",
        figures.margins(
            statistics.margins(pairs, tau0, alpha), {row["round"]: row["tau"] for row in rows} if sets else None
        ),
        reading.margins(rows, sets),
    )
    margins.draw(
        "rank-share" if sets else "lowered-share",
        "Share in the rank set" if sets else "Share whose reward the principle lowered",
        "With 95 % intervals (Wilson)." + (" Each round at its own τ_t." if sets else ""),
        figures.shares(rows, sets),
        reading.shares(rows, sets),
    )
    yield margins

    lengths = Section("length", "Rewards against length")
    by_length = {t: statistics.rewards_by_length(pairs, t) for t in sorted({rows[0]["round"], rows[-1]["round"]})}
    lengths.draw(
        "rewards-by-length",
        "Mean reward against length",
        "Responses of the first and the last round in bins of about equal count, with 95 % intervals: does the reward "
        "model pay for length?",
        figures.rewards_by_length(by_length),
        reading.rewards_by_length(by_length[rows[-1]["round"]], rows[-1]["round"]),
    )
    said = "Mean length of the responses in tokens."
    lengths.draw("lengths", "Length by round", said, figures.lengths(rows), reading.lengths(rows))
    lengths.tables.append(_response_table(rows))
    yield lengths


def _round_table(rows: list[dict[str, Any]], sets: bool) -> Table:
    cells = [
        [
            *[str(row["round"]), str(row["rows"])],
            *[_interval(row[f"mean_{name}"], row[f"half_{name}"]) for name in ("s", "s_prompt", "margin")],
            *([f"{row['tau']:.3f}", _share(row["rank_share"])] if sets else []),
            _share(row["lowered_share"]),
        ]
        for row in rows
    ]
    head = ["round", "pairs", "s", "s_prompt", "gap", *(["τ_t", "rank set"] if sets else []), "lowered"]
    return Table("Means with 95 % intervals (1.96 standard errors over queries)", head, cells)


def _reward_table(own: list[dict[str, Any]]) -> Table:
    cells = [
        [str(at), visible(public(each["model"])), f"{each['mean_y']:.3f}", f"{each['mean_y_prompt']:.3f}"]
        + ["–" if value is None else f"{value:.3f}" for value in each["correlations"]]
        for at, each in enumerate(own, start=1)
    ]
    head = ["", "reward by", "y", "y_prompt", *[f"with {at + 1}" for at in range(len(own))]]
    return Table("Rewards that s and s_prompt are made of: means, and correlations over all responses", head, cells)


def _response_table(rows: list[dict[str, Any]]) -> Table:
    arms = ("y", "y_prompt")
    cells = [
        [str(row["round"])]
        + [f"{row[f'mean_len_{arm}']:.1f}" for arm in arms]
        + [_share(row[f"{what}_{arm}"]) for what in ("truncated", "empty") for arm in arms]
        for row in rows
    ]
    head = ["round", *[f"{what} {arm}" for what in ("tokens", "cut", "empty") for arm in arms]]
    return Table("Mean length; share cut by the limit; share empty", head, cells)


def _interval(mean: float, half: float | None) -> str:
    return f"{mean:.3f}" if half is None else f"{mean:.3f} ± {half:.3f}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _purity(report: PurityReport | None) -> Section:
    """Section 5 of the paper."""
    section = Section("purity", "Purity (Section 5)")
    if report is None:
        section.missing.append("No purity.json: ple purity --run RUN measures it.")
        return section
    policies = [policy.model_copy(update={"label": label(policy.label)}) for policy in report.policies]
    how = "mean" if report.normalized else "sum"
    section.words.append(
        f"On {policies[0].all_pairs.pairs} pairs: a level set L(e), the queries with s_prompt − s ≥ e, is pure for a "
        "policy that gives y_prompt a higher probability than y on all of it, both given x alone (Definition 5.1). "
        f"Log-probabilities are the {how} over tokens{f' in {report.precision}' if report.precision else ''}."
    )
    if len(policies) > 1:
        section.words.append(
            f"Lemma 5.2 says that the smallest pure e falls with every round. It fell {steps_down(policies)} steps."
        )
    section.draw(
        "purity-by-margin",
        "Agreement by margin",
        "Share of pairs in which the policy ranks the two responses as the reward does, in bins of about equal count, "
        "with 95 % intervals (Wilson). Chance is 50 %.",
        figures.purity_by_margin(policies),
        reading.purity(policies),
    )
    if any(pure.e is not None for policy in policies for pure in policy.all_pairs.pure_sets):
        section.draw(
            "smallest-pure",
            "Smallest pure e",
            "The smallest margin e whose level set is this pure; no point where none is.",
            figures.smallest_pure(policies),
            reading.smallest_pure(policies),
        )
    caption = "Agreement of each policy, and the smallest pure e with the number of pairs in its level set"
    labels = [policy.label for policy in policies]
    section.tables.append(Table(caption, *policy_table(policies, labels, "({} pairs)")))
    bound = report.bound
    values = {"l, estimated": bound.l, "e_0": bound.e_0, "e_end": bound.e_end}
    values["Eq. 17, the proof's own step: rounds, at most"] = bound.rounds_by_proof
    rows = [[name, "–" if value is None else f"{value:.4g}"] for name, value in values.items()]
    note = (
        f"{_sentence(visible(bound.says))}l is {L_BIAS}. The number of Eq. 17 is for α = 1; in general it is that "
        "number times α, and α < 1."
    )
    section.tables.append(Table("Theorem 5.3, on rewards mapped to [0, 1]", ["quantity", "value"], rows, note=note))
    return section


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}. " if text else ""


def _stages(stages: list[dict[str, Any]]) -> Section:
    """What ple run has done, and how long it took."""
    section = Section("stages", "Stages and their time")
    if not stages:
        section.missing.append("No stages.json: ple run keeps one.")
        return section
    seconds: dict[str, dict[str, float]] = {}
    attempts = []
    for (stage, t), group in groupby(stages, key=lambda stage: (stage["stage"], stage["round"])):
        records, name = list(group), label(str(stage))
        time = sum(record["seconds"] or 0.0 for record in records)
        times = seconds.setdefault(name if t is None else label(f"round {t}"), {})
        times[name] = times.get(name, 0.0) + time
        code = records[-1]["exit_code"]
        ended = "running, or killed" if code is None else "done" if code == 0 else f"exit code {code}"
        attempts.append([name, "" if t is None else str(t), str(len(records)), f"{time:.1f}", ended])
    if total := sum(stage["seconds"] or 0.0 for stage in stages):
        said = reading.stage_times(seconds)
        section.draw("stages", "Time by stage", "Minutes, all attempts together.", figures.stage_times(seconds), said)
        section.words.append(f"{total / 60:.1f} minutes in all.")
    else:
        section.missing.append("No stage has ended yet: each has its time here when it has.")
    head = ["stage", "round", "attempts", "seconds", "ended"]
    section.tables.append(Table("Every stage", head, attempts, folded=True))
    return section


SECTIONS: tuple[Callable[[Sources], Iterable[Section]], ...] = (
    _of_pairs,
    lambda sources: [training(sources.metrics, by_set=sources.knows_sets, by_eq6=sources.by_eq6)],
    lambda sources: [_purity(sources.purity)],
    lambda sources: [evaluations(sources.evals, sources.reward_models)],
    lambda sources: [judged(sources.judges)],
    lambda sources: [_stages(sources.stages)],
)
"""In the order of the page."""
