"""The report's figures. Each function draws numbers that are given; it reads no file and computes no statistic.

Colours: blue is y (without the principle), orange y_prompt (with it); see `svg.PALETTE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ple_data.report.round_tables import Histogram, wilson
from ple_data.report.svg import PALETTE
from schemas.reports import JudgeReport, PurityPolicy

SIZE = (4.6, 3.0)
MOST_ROWS = 10
"""Rounds that a figure with a row a round shows."""

Rows = list[dict[str, Any]]


def _axes(height: float = SIZE[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(SIZE[0], height), layout="constrained")
    return figure, figure.add_subplot()


def _rounds(axes: Axes, rounds: Sequence[int]) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.set_xlim(min(rounds) - 0.3, max(rounds) + 0.3)
    axes.set_xlabel("round")


def _curve(axes: Axes, rows: Rows, mean: str, half: str, colour: str, label: str, marker: str = "o") -> None:
    axes.errorbar(
        [row["round"] for row in rows],
        [row[mean] for row in rows],
        yerr=[row[half] or 0.0 for row in rows],
        fmt=f"{marker}-",
        color=PALETTE[colour],
        capsize=3,
        label=label,
    )


def _legend(figure: Figure, columns: int = 2) -> None:
    figure.legend(loc="outside upper left", ncols=columns, handlelength=1.6, columnspacing=1.2)


def rewards(rows: Rows) -> Figure:
    """s and s_prompt by round with 95 % intervals."""
    figure, axes = _axes()
    _curve(axes, rows, "mean_s_prompt", "half_s_prompt", "orange", "s_prompt, with the principle", "s")
    _curve(axes, rows, "mean_s", "half_s", "blue", "s, without")
    _rounds(axes, [row["round"] for row in rows])
    axes.set_ylabel("mean reward")
    _legend(figure)
    return figure


def gap(rows: Rows, sets: bool = True) -> Figure:
    """Mean margin with its interval, and (with `sets`) tau_t."""
    figure, axes = _axes()
    rounds = [row["round"] for row in rows]
    _curve(axes, rows, "mean_margin", "half_margin", "purple", "gap: mean of s_prompt − s")
    if sets:
        axes.plot(rounds, [row["tau"] for row in rows], "D--", color=PALETTE["muted"], label="threshold τ_t")
    axes.axhline(0, color=PALETTE["muted"], linewidth=0.8)
    _rounds(axes, rounds)
    axes.set_ylabel("reward")
    _legend(figure)
    return figure


def shares(rows: Rows, sets: bool = True) -> Figure:
    """Share of the pairs (with `sets`) in the rank set, and of those whose reward the principle lowered."""
    figure, axes = _axes()
    rounds = [row["round"] for row in rows]
    rank = [("rank_share", "orange", "s-", "rank set: margin > τ_t")] if sets else []
    for name, colour, style, label in (*rank, ("lowered_share", "blue", "o-", "reward lowered: margin < 0")):
        ends = [wilson(round(row[name] * row["rows"]), row["rows"]) for row in rows]
        values = [row[name] for row in rows]
        errors = [
            [max(0.0, v - low) for v, (low, _) in zip(values, ends, strict=True)],
            [max(0.0, high - v) for v, (_, high) in zip(values, ends, strict=True)],
        ]
        axes.errorbar(rounds, values, yerr=errors, fmt=style, color=PALETTE[colour], capsize=3, label=label)
    _rounds(axes, rounds)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("share of the pairs")
    _legend(figure)
    return figure


def shown_rounds(rounds: Sequence[int]) -> list[int]:
    """All rounds, or the first, the last and evenly spaced ones between."""
    if len(rounds) <= MOST_ROWS:
        return list(rounds)
    return [rounds[round(place * (len(rounds) - 1) / (MOST_ROWS - 1))] for place in range(MOST_ROWS)]


def margins(histogram: Histogram, taus: dict[int, float] | None) -> Figure:
    """A row a round: how many pairs have which margin, coloured by set with tau_t drawn in, or without `taus` alike."""
    rounds = shown_rounds(sorted(histogram.counts))
    figure = Figure(figsize=(SIZE[0], max(SIZE[1], 0.8 + 0.62 * len(rounds))), layout="constrained")
    rows = figure.subplots(len(rounds), 1, sharex=True, squeeze=False)[:, 0]
    left, width = histogram.edges[:-1], histogram.edges[1] - histogram.edges[0]
    for axes, t in zip(rows, rounds, strict=True):
        wsft, rank = histogram.counts[t]["wsft"], histogram.counts[t]["rank"]
        if taus is None:
            both = [a + b for a, b in zip(wsft, rank, strict=True)]
            axes.bar(left, both, width, align="edge", color=PALETTE["purple"], label="pairs")
        else:
            axes.bar(left, wsft, width, align="edge", color=PALETTE["blue"], label="weighted SFT")
            axes.bar(left, rank, width, bottom=wsft, align="edge", color=PALETTE["orange"], label="rank set")
            axes.axvline(taus[t], color=PALETTE["ink"], linewidth=1.2, linestyle="--", label="τ_t")
        axes.set_yticks([])
        axes.grid(False)
        axes.spines["left"].set_visible(False)
        axes.set_ylabel(f"round {t}", rotation=0, ha="right", va="center")
    rows[-1].set_xlabel("margin s_prompt − s")
    figure.legend(*rows[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, handlelength=1.4)
    return figure


def rewards_by_length(by_round: dict[int, dict[str, Rows]]) -> Figure:
    """Mean reward against the response's length: a panel for each round given."""
    figure = Figure(figsize=(SIZE[0], SIZE[1]), layout="constrained")
    panels = figure.subplots(1, len(by_round), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (t, arms) in zip(panels, by_round.items(), strict=True):
        for arm, colour, fmt in (("y", "blue", "o-"), ("y_prompt", "orange", "s-")):
            axes.errorbar(
                [row["length"] for row in arms[arm]],
                [row["mean"] for row in arms[arm]],
                yerr=[row["half"] for row in arms[arm]],
                fmt=fmt,
                color=PALETTE[colour],
                capsize=2,
                label={"y": "y", "y_prompt": "y_prompt, with the principle"}[arm],
            )
        axes.set_title(f"round {t}")
        axes.set_xlabel("tokens")
    panels[0].set_ylabel("mean reward")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, handlelength=1.6)
    return figure


def lengths(rows: Rows) -> Figure:
    """Mean length of the responses by round."""
    figure, axes = _axes()
    rounds = [row["round"] for row in rows]
    for arm, colour, fmt, label in (("y_prompt", "orange", "s-", "y_prompt, with the principle"),
                                    ("y", "blue", "o-", "y")):  # fmt: skip
        axes.plot(rounds, [row[f"mean_len_{arm}"] for row in rows], fmt, color=PALETTE[colour], label=label)
    _rounds(axes, rounds)
    axes.set_ylim(0, 1.12 * axes.dataLim.ymax)
    axes.set_ylabel("mean length in tokens")
    _legend(figure)
    return figure


def training(curves: dict[str, list[tuple[float, float]]], borders: dict[int, float], label: str) -> Figure:
    """Curves over the steps of all rounds, one behind the other; `borders`: where each round begins."""
    figure, axes = _axes()
    colours = ("orange", "blue", "green", "purple")
    values = [value for points in curves.values() for _, value in points]
    for (name, points), colour in zip(curves.items(), colours, strict=False):
        axes.plot(*zip(*points, strict=True), color=PALETTE[colour], linewidth=1.3, label=name)
    for t, start in borders.items():
        axes.axvline(start, color=PALETTE["grid"], linewidth=1)
        if len(borders) <= MOST_ROWS:
            axes.annotate(f"{t}", (start, 1), xycoords=("data", "axes fraction"), xytext=(3, -9),
                          textcoords="offset points", color=PALETTE["muted"], fontsize=8)  # fmt: skip
    if max(map(abs, values), default=0.0) > 1000:
        axes.set_yscale("symlog", linthresh=1)
    axes.set_xlabel("step of training; the numbers above are rounds")
    axes.set_ylabel(label)
    _legend(figure)
    return figure


def purity_by_margin(policies: Sequence[PurityPolicy]) -> Figure:
    """Share in agreement with the reward by margin: the start policy, the last one, and thinly those between."""
    figure, axes = _axes(3.4)
    first, last = policies[0], policies[-1]
    for policy in policies[1:-1]:
        _agreement(axes, policy, color=PALETTE["muted"], linewidth=0.7, linestyle="-", alpha=0.6)
    drawn = [(first, "blue", "o"), (last, "orange", "s")] if len(policies) > 1 else [(last, "orange", "s")]
    for policy, colour, marker in drawn:
        _agreement(axes, policy, color=PALETTE[colour], marker=marker, label=policy.label)
        bins = [b for b in policy.bins if b.pairs]
        ends = [wilson(b.agree, b.pairs) for b in bins]
        places = [place for place, b in enumerate(policy.bins) if b.pairs]
        axes.vlines(places, [a for a, _ in ends], [b for _, b in ends], color=PALETTE[colour], linewidth=1, alpha=0.7)
    if len(policies) > 2:
        axes.plot([], [], color=PALETTE["muted"], linewidth=0.7, label="between")
    axes.axhline(0.5, color=PALETTE["muted"], linewidth=0.8, linestyle=":")
    axes.set_xticks(
        range(len(last.bins)),
        [f"{b.low:.2g} to {b.high:.2g}" for b in last.bins],
        rotation=40,
        ha="right",
        fontsize=7.5,
    )
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("margin s_prompt − s")
    axes.set_ylabel("policy agrees with the reward")
    _legend(figure, 3)
    return figure


def _agreement(axes: Axes, policy: PurityPolicy, **look: Any) -> None:
    points = [(place, b.agree / b.pairs) for place, b in enumerate(policy.bins) if b.pairs]
    axes.plot([place for place, _ in points], [share for _, share in points], **look)


def smallest_pure(policies: Sequence[PurityPolicy]) -> Figure:
    """The smallest pure e of each policy, at each purity; a gap where there is none."""
    figure, axes = _axes()
    looks = (("orange", "s-"), ("blue", "o-"), ("green", "^-"))
    places, highest = range(len(policies)), 0.0
    for at, (colour, fmt) in enumerate(looks):  # wider ones first: the purities often share their e
        pure = [policy.all_pairs.pure_sets[at] for policy in policies]
        values = [float("nan") if found.e is None else found.e for found in pure]
        axes.plot(places, values, fmt, color=PALETTE[colour], label=f"{pure[0].percent} % pure", linewidth=4 - 1.4 * at,
                  markersize=9 - 2.2 * at)  # fmt: skip
        highest = max([highest, *[found.e for found in pure if found.e is not None]])
    few = len(policies) <= MOST_ROWS
    shown = [policy.label if few else str(policy.after_round) for policy in policies]
    axes.set_xticks(places, shown, rotation=40 if few and len(policies) > 3 else 0, fontsize=8)
    axes.set_xlim(-0.3, len(policies) - 0.7)
    axes.set_ylim(0, 1.12 * highest)
    axes.set_xlabel("policy")
    axes.set_ylabel("smallest pure e (margin)")
    _legend(figure, 3)
    return figure


def win_rates(reports: Sequence[tuple[str, JudgeReport]]) -> Figure:
    """A bar for each comparison: won, tied, lost. A label has up to four lines."""
    figure, axes = _axes(1.3 + 0.7 * len(reports))
    for place, (_, report) in enumerate(reversed(reports)):
        total = (report.wins + report.ties + report.losses) or 1
        left = 0.0
        for count, colour in ((report.wins, "orange"), (report.ties, "grid"), (report.losses, "blue")):
            share = count / total
            axes.barh(place, share, left=left, color=PALETTE[colour], height=0.6)
            if share > 0.08:
                ink = PALETTE["ink" if colour == "grid" else "paper"]
                axes.text(left + share / 2, place, str(count), ha="center", va="center", color=ink, fontsize=8.5)
            left += share
    names = [name for name, _ in reversed(reports)]
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 1)
    axes.grid(False)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for label, colour in (("won", "orange"), ("tied", "grid"), ("lost", "blue")):
        axes.barh(0, 0, color=PALETTE[colour], label=label)
    _legend(figure, 3)
    return figure


def stage_times(seconds: dict[str, dict[str, float]]) -> Figure:
    """Stacked bars: the time of each stage, a row a round (or a stage before the rounds), in minutes."""
    figure, axes = _axes(max(1.8, 1.1 + 0.3 * len(seconds)))
    colours = {"reward": "muted", "gen": "blue", "score": "green", "train": "orange"}
    done: set[str] = set()
    for place, stages in enumerate(seconds.values()):
        left = 0.0
        for stage, time in stages.items():
            label = None if stage in done else stage
            axes.barh(
                place, time / 60, left=left, color=PALETTE[colours.get(stage, "purple")], height=0.65, label=label
            )
            done.add(stage)
            left += time / 60
    axes.set_yticks(range(len(seconds)), list(seconds))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("minutes")
    _legend(figure, 5)
    return figure
