"""What a figure's numbers say about this run, in a sentence or two; of two rounds, what is not clear is called so.

A change is clear where it is more than the two 95 % intervals allow, put together as of independent samples. Reads
nothing, and says nothing that its numbers do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ple_data.report.round_tables import wilson
from schemas.reports import Estimate, JudgeReport, PurityPolicy

Rows = Sequence[Mapping[str, Any]]


def number(value: float) -> str:
    """Two decimals, or two digits where those say nothing."""
    return f"{value:.2f}" if value == 0 or 0.005 <= abs(value) < 1000 else f"{value:.2g}"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def change(what: str, first: float, last: float, half: float | None = None, form: Any = number) -> str:
    """That it rose, fell, or did not clearly do so; half: of the 95 % interval of the difference, if there is one."""
    ends = f"from {form(first)} to {form(last)}"
    if form(first) == form(last):
        return f"{what} stayed at {form(last)}"
    if half is not None and abs(last - first) <= half:
        return f"{what} did not clearly change ({ends})"
    return f"{what} {'rose' if last > first else 'fell'} {ends}"


def _both(first: float | None, last: float | None) -> float:
    """Half of the interval of a difference of independent means; infinite where one is not known."""
    return math.inf if first is None or last is None else math.hypot(first, last)


def _of_means(rows: Rows, name: str, what: str) -> tuple[str, int]:
    """The change of a mean from the first round to the last, and its sign where it is clear."""
    first, last = rows[0], rows[-1]
    half = _both(first[f"half_{name}"], last[f"half_{name}"])
    before, after = first[f"mean_{name}"], last[f"mean_{name}"]
    clear = abs(after - before) > half
    return change(what, before, after, half), (1 if after > before else -1) if clear else 0


def _of_shares(rows: Rows, name: str, what: str) -> str:
    first, last = rows[0], rows[-1]
    halves = [
        max(abs(row[name] - end) for end in wilson(round(row[name] * row["rows"]), row["rows"]))
        for row in (first, last)
    ]
    return change(what, first[name], last[name], _both(*halves), percent)


def _span(rows: Rows) -> str:
    return f"From round {rows[0]['round']} to {rows[-1]['round']}: "


def rewards(rows: Rows) -> str:
    """Of y and y_prompt."""
    last = rows[-1]
    if len(rows) == 1:
        more = "more" if last["mean_margin"] > 0 else "less"
        unclear = last["half_margin"] is None or abs(last["mean_margin"]) <= last["half_margin"]
        found = "not clearly another reward" if unclear else f"{number(abs(last['mean_margin']))} {more}"
        return (
            f"One round: with the principle responses earn {found} ({number(last['mean_s_prompt'])} to "
            f"{number(last['mean_s'])} without)."
        )
    (plain, up), (guided, _) = _of_means(rows, "s", "the reward of y"), _of_means(rows, "s_prompt", "that of y_prompt")
    closer = _of_means(rows, "margin", "")[1] < 0
    return f"{_span(rows)}{plain}, {guided}.{' y catches up with y_prompt.' if up > 0 and closer else ''}"


def gap(rows: Rows, sets: bool) -> str:
    """Of the mean margin, and on which side of it tau is."""
    first, last = rows[0], rows[-1]
    if len(rows) == 1:
        found = f"One round: the gap is {number(last['mean_margin'])}"
    else:
        found = _span(rows) + _of_means(rows, "margin", "the gap")[0]
    if not sets:
        return f"{found}."
    above = [row["tau"] > row["mean_margin"] for row in (first, last)]
    now = "now " if above[0] != above[1] else ""
    tau = f"τ_t ({number(last['tau'])}) is {now}{'above' if above[1] else 'below'} it"
    if len(rows) == 1:
        return f"{found}; {tau}: {percent(last['rank_share'])} of the pairs rank."
    share = _of_shares(rows, "rank_share", "the share of pairs that rank")
    return f"{found}; {tau}, and {share}."


def margins(rows: Rows, sets: bool) -> str:
    """Where the middle half of the last round's margins lies."""
    last = rows[-1]
    low, high = last["margin_q25"], last["margin_q75"]
    found = f"In round {last['round']} half of the margins lie between {number(low)} and {number(high)}"
    if sets:
        tau = last["tau"]
        place = "above" if tau > high else "below" if tau < low else "among"
        found += f"; τ_t ({number(tau)}) is {place} them"
    return f"{found}. The principle lowered the reward of {percent(last['lowered_share'])} of the pairs."


def shares(rows: Rows, sets: bool) -> str:
    """Of the rank set and of lowered rewards."""
    last = rows[-1]
    if len(rows) == 1:
        rank = f"{percent(last['rank_share'])} of the pairs rank; " if sets else ""
        return f"One round: {rank}the principle lowered the reward of {percent(last['lowered_share'])}."
    found = [_of_shares(rows, "rank_share", "the rank set")] if sets else []
    return f"{_span(rows)}{', '.join([*found, _of_shares(rows, 'lowered_share', 'the share of lowered rewards')])}."


def rewards_by_length(arms: Mapping[str, Rows], round: int) -> str:
    """Whether the longest responses of a round earn another reward than its shortest."""
    found = []
    for arm, bins in arms.items():
        short, long = bins[0], bins[-1]
        if len(bins) == 1:
            found.append(f"{arm} has one length")
            continue
        more, half = long["mean"] - short["mean"], _both(short["half"], long["half"])
        earn = (
            f"{number(abs(more))} {'more' if more > 0 else 'less'} than"
            if abs(more) > half
            else "no clearly other reward than"
        )
        found.append(
            f"the longest {arm} (about {long['length']:.0f} tokens) earn {earn} the shortest ({short['length']:.0f})"
        )
    return f"In round {round}: {'; '.join(found)}."


def lengths(rows: Rows) -> str:
    """Of both arms' mean lengths, with what the limit cut."""
    last = rows[-1]
    arms, form = ("y", "y_prompt"), "{:.1f}".format
    if len(rows) == 1:
        found = "One round: " + ", ".join(f"{arm} has {form(last[f'mean_len_{arm}'])} tokens" for arm in arms)
    else:
        ends = [(rows[0][f"mean_len_{arm}"], last[f"mean_len_{arm}"]) for arm in arms]
        found = _span(rows) + ", ".join(
            change(f"the length of {arm}", *end, form=form) for arm, end in zip(arms, ends, strict=True)
        )
    cut = " and ".join(f"{percent(last[f'truncated_{arm}'])} of {arm}" for arm in arms)
    return (
        f"{found} tokens. The limit cut {cut} in round {last['round']}."
        if len(rows) > 1
        else (f"{found}. The limit cut {cut}.")
    )


def curves(found: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """First and last point of each curve."""
    if all(len(points) < 2 for points in found.values()):
        return "One point: no change to see yet."
    told = [change(name, points[0][1], points[-1][1]) for name, points in found.items() if len(points) > 1]
    return f"From the first point to the last: {', '.join(told)}."


def logps(found: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Of the curves, and what those of the rank set do together."""
    text = curves(found)
    both = [found.get(f"rank, {arm}", ()) for arm in ("y_prompt", "y")]
    if any(len(points) < 2 for points in both):
        return text
    guided, plain = (points[-1][1] - points[0][1] for points in both)
    if guided > plain:
        fell = "though both fell" if guided < 0 else "though both rose" if plain > 0 else "one up and one down"
        return f"{text} In the rank set y_prompt gained on y, {fell}."
    return f"{text} In the rank set y_prompt did not gain on y."


def drift(points: Sequence[tuple[float, float]]) -> str:
    """Of the last point, and of the lowest."""
    last, lowest = points[-1][1], min(value for _, value in points)
    back = f" The lowest was {number(lowest)}." if number(lowest) != number(last) else ""
    return f"At the end they stand at {number(last)} nats a token against the start policy.{back}"


def purity(policies: Sequence[PurityPolicy]) -> str:
    """Agreement of the first and the last policy, against chance and each other."""
    first, last = policies[0], policies[-1]
    if not last.all_pairs.ranked or not first.all_pairs.ranked:
        return "No pair has a margin other than 0."
    low, high = wilson(last.all_pairs.agree, last.all_pairs.ranked)
    share = last.all_pairs.agree / last.all_pairs.ranked
    chance = "which chance allows too" if low <= 0.5 <= high else f"{'more' if share > 0.5 else 'less'} than chance"
    found = f"{last.label} agrees with the reward on {100 * share:.1f} % of the pairs, {chance}"
    if len(policies) == 1:
        return f"{found}."
    before = first.all_pairs.agree / first.all_pairs.ranked
    return f"{found}; {first.label} did on {100 * before:.1f} % of the same pairs."


def smallest_pure(policies: Sequence[PurityPolicy]) -> str:
    """The smallest pure e of the first policy and the last."""
    told = []
    for first, last in zip(policies[0].all_pairs.pure_sets, policies[-1].all_pairs.pure_sets, strict=True):
        ends = ["none" if found.e is None else f"{number(found.e)} ({found.pairs} pairs)" for found in (first, last)]
        told.append(f"at {last.percent} % {f'{ends[0]}, then {ends[1]}' if len(policies) > 1 else ends[0]}")
    return f"{'First and last policy' if len(policies) > 1 else 'One policy'}: {'; '.join(told)}."


def rewards_by_kl(policies: Sequence[tuple[str, Mapping[str, Estimate]]], rewards: Mapping[str, str]) -> str:
    """Which policy has the highest mean of each reward, and how far it went for it."""
    told = []
    for reward, title in rewards.items():
        name, found = max(((n, f) for n, f in policies if reward in f), key=lambda one: one[1][reward].mean)
        told.append(f"{title} is highest for {name}: {number(found[reward].mean)} at {number(found['kl'].mean)} nats")
    return f"{'; '.join(told)}."


def win_rates(reports: Sequence[tuple[str, JudgeReport]]) -> str:
    """Of each comparison, whether its win rate is above or below a half; at most three are told."""
    told = []
    for name, report in reports[:3]:
        rate = report.win_rate
        if rate is None:
            told.append(f"{name}: no verdict")
        elif rate.low <= 0.5 <= rate.high:
            told.append(f"{name}: no clear winner ({percent(rate.mean)})")
        else:
            told.append(f"{name}: A is {'better' if rate.mean > 0.5 else 'worse'} ({percent(rate.mean)} of verdicts)")
    return f"{'; '.join(told)}{' …' if len(reports) > 3 else '.'}"


def stage_times(seconds: Mapping[str, Mapping[str, float]]) -> str:
    """Which stage took the most."""
    by_stage: dict[str, float] = {}
    for stages in seconds.values():
        for stage, time in stages.items():
            by_stage[stage] = by_stage.get(stage, 0.0) + time
    total, longest = sum(by_stage.values()), max(by_stage, key=lambda stage: by_stage[stage])
    if not total:
        return "No stage has ended yet."
    return f"{longest} took the most: {by_stage[longest] / 60:.1f} of {total / 60:.1f} minutes."
