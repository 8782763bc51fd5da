"""The report's figures. Each function draws numbers that are given; it reads no file and computes no statistic.

Colours: blue is y (without the principle), orange y_prompt (with it); see `svg.PALETTE`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ple_data.report.round_tables import Histogram, wilson
from ple_data.report.svg import PALETTE
from schemas.reports import Estimate, JudgeReport, PurityPolicy

SIZE = (4.6, 3.0)
MOST_ROWS = 10
"""Rounds that a figure with a row a round shows."""
ARMS = (("y", "blue", "o-", "y"), ("y_prompt", "orange", "s-", "y_prompt, with the principle"))

Rows = list[dict[str, Any]]


def _axes(height: float = SIZE[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(SIZE[0], height), layout="constrained")
    return figure, figure.add_subplot()


def _by_round(rows: Rows, label: str) -> tuple[Figure, Axes, list[int]]:
    """Axes over the rounds, of which each has a row, and the rounds; `label`: what stands beside the other axis."""
    figure, axes = _axes()
    rounds = [row["round"] for row in rows]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.set_xlim(min(rounds) - 0.3, max(rounds) + 0.3)
    axes.set_xlabel("round")
    axes.set_ylabel(label)
    return figure, axes, rounds


def _means(axes: Axes, rows: Rows, name: str, colour: str, fmt: str, label: str) -> None:
    values, halves = [row[f"mean_{name}"] for row in rows], [row[f"half_{name}"] or 0.0 for row in rows]
    axes.errorbar(
        [row["round"] for row in rows], values, halves, fmt=fmt, color=PALETTE[colour], capsize=3, label=label
    )


def _legend(figure: Figure, columns: int = 2) -> Figure:
    figure.legend(loc="outside upper left", ncols=columns, handlelength=1.6, columnspacing=1.2)
    return figure


def rewards(rows: Rows) -> Figure:
    """s and s_prompt by round with 95 % intervals."""
    figure, axes, _ = _by_round(rows, "mean reward")
    _means(axes, rows, "s_prompt", "orange", "s-", "s_prompt, with the principle")
    _means(axes, rows, "s", "blue", "o-", "s, without")
    return _legend(figure)


def gap(rows: Rows, sets: bool = True) -> Figure:
    """Mean margin with its interval, and (with `sets`) tau_t."""
    figure, axes, rounds = _by_round(rows, "reward")
    _means(axes, rows, "margin", "purple", "o-", "gap: mean of s_prompt − s")
    if sets:
        axes.plot(rounds, [row["tau"] for row in rows], "D--", color=PALETTE["muted"], label="threshold τ_t")
    axes.axhline(0, color=PALETTE["muted"], linewidth=0.8)
    return _legend(figure)


def shares(rows: Rows, sets: bool = True) -> Figure:
    """Share of the pairs (with `sets`) in the rank set, and of those whose reward the principle lowered."""
    figure, axes, rounds = _by_round(rows, "share of the pairs")
    rank = [("rank_share", "orange", "s-", "rank set: margin > τ_t")] if sets else []
    for name, colour, fmt, label in (*rank, ("lowered_share", "blue", "o-", "reward lowered: margin < 0")):
        values = [row[name] for row in rows]
        ends = [wilson(round(row[name] * row["rows"]), row["rows"]) for row in rows]
        below = [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
        above = [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]
        axes.errorbar(rounds, values, (below, above), fmt=fmt, color=PALETTE[colour], capsize=3, label=label)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return _legend(figure)


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
    figure = Figure(figsize=SIZE, layout="constrained")
    panels = figure.subplots(1, len(by_round), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (t, arms) in zip(panels, by_round.items(), strict=True):
        for arm, colour, fmt, label in ARMS:
            x, y, half = ([row[name] for row in arms[arm]] for name in ("length", "mean", "half"))
            axes.errorbar(x, y, half, fmt=fmt, color=PALETTE[colour], capsize=2, label=label)
        axes.set_title(f"round {t}")
        axes.set_xlabel("tokens")
    panels[0].set_ylabel("mean reward")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, handlelength=1.6)
    return figure


def lengths(rows: Rows) -> Figure:
    """Mean length of the responses by round."""
    figure, axes, rounds = _by_round(rows, "mean length in tokens")
    for arm, colour, fmt, label in reversed(ARMS):
        axes.plot(rounds, [row[f"mean_len_{arm}"] for row in rows], fmt, color=PALETTE[colour], label=label)
    axes.set_ylim(0, 1.12 * axes.dataLim.ymax or 1)
    return _legend(figure)


def training(curves: dict[str, list[tuple[float, float]]], borders: dict[int, int], label: str) -> Figure:
    """Curves over the steps of all rounds, one behind the other; `borders`: where each round begins."""
    figure, axes = _axes()
    for (name, points), colour in zip(curves.items(), ("orange", "blue", "green", "purple"), strict=False):
        axes.plot(*zip(*points, strict=True), color=PALETTE[colour], linewidth=1.3, label=name)
    for t, start in borders.items():
        axes.axvline(start, color=PALETTE["grid"], linewidth=1)
        if len(borders) <= MOST_ROWS:
            axes.annotate(f"{t}", (start, 1), xycoords=("data", "axes fraction"), xytext=(3, -9),
                          textcoords="offset points", color=PALETTE["muted"], fontsize=8)  # fmt: skip
    if max((abs(value) for points in curves.values() for _, value in points), default=0.0) > 1000:
        axes.set_yscale("symlog", linthresh=1)
    axes.set_xlabel("step of training; the numbers above are rounds")
    axes.set_ylabel(label)
    return _legend(figure)


def purity_by_margin(policies: Sequence[PurityPolicy]) -> Figure:
    """Share in agreement with the reward by margin: the start policy, the last one, and thinly those between."""
    figure, axes = _axes(3.4)
    thin: dict[str, Any] = {"color": PALETTE["muted"], "linewidth": 0.7}
    for policy in policies[1:-1]:
        axes.plot(*_agreement(policy), linestyle="-", alpha=0.6, **thin)
    ends = [(policies[-1], "orange", "s")]
    for policy, colour, marker in [(policies[0], "blue", "o"), *ends] if len(policies) > 1 else ends:
        places, shares = _agreement(policy)
        axes.plot(places, shares, color=PALETTE[colour], marker=marker, label=policy.label)
        low, high = zip(*[wilson(b.agree, b.pairs) for b in policy.bins if b.pairs], strict=True)
        axes.vlines(places, low, high, color=PALETTE[colour], linewidth=1, alpha=0.7)
    if len(policies) > 2:
        axes.plot([], [], label="between", **thin)
    axes.axhline(0.5, color=PALETTE["muted"], linewidth=0.8, linestyle=":")
    names = [f"{b.low:.2g} to {b.high:.2g}" for b in policies[-1].bins]
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=7.5)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("margin s_prompt − s")
    axes.set_ylabel("policy agrees with the reward")
    return _legend(figure, 3)


def _agreement(policy: PurityPolicy) -> tuple[list[int], list[float]]:
    """Places of the bins that have pairs, and the share in agreement there."""
    full = [(place, b) for place, b in enumerate(policy.bins) if b.pairs]
    return [place for place, _ in full], [b.agree / b.pairs for _, b in full]


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
    axes.set_ylim(0, 1.12 * highest or 1)
    axes.set_xlabel("policy")
    axes.set_ylabel("smallest pure e (margin)")
    return _legend(figure, 3)


def rewards_by_kl(policies: Sequence[tuple[str, Mapping[str, Estimate]]], rewards: Mapping[str, str]) -> Figure:
    """A panel for each reward (its title by its name): a policy's mean against its KL, with 95 % intervals."""
    figure = Figure(figsize=(SIZE[0], 0.6 + 2.2 * len(rewards)), layout="constrained")
    panels = figure.subplots(len(rewards), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (reward, title) in zip(panels, rewards.items(), strict=True):
        for name, found in [(name, found) for name, found in policies if reward in found]:
            x, y = found["kl"], found[reward]
            axes.errorbar(x.mean, y.mean, _sides(y), _sides(x), fmt="o", color=PALETTE["blue"], capsize=3)
            axes.annotate(name, (x.mean, y.mean), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.margins(0.15)
        axes.set_ylabel(title)
    panels[-1].set_xlabel("KL to the first policy, nats a response")
    return figure


def _sides(value: Estimate) -> list[list[float]]:
    return [[max(0.0, value.mean - value.low)], [max(0.0, value.high - value.mean)]]


def win_rates(reports: Sequence[tuple[str, JudgeReport]]) -> Figure:
    """A bar for each comparison: won, tied, lost. A label has up to four lines."""
    figure, axes = _axes(1.3 + 0.7 * len(reports))
    colours = ("orange", "grid", "blue")
    for place, (_, report) in enumerate(reversed(reports)):
        counts = (report.wins, report.ties, report.losses)
        left = 0.0
        for count, colour in zip(counts, colours, strict=True):
            share = count / (sum(counts) or 1)
            axes.barh(place, share, left=left, color=PALETTE[colour], height=0.6)
            if share > 0.08:
                ink = PALETTE["ink" if colour == "grid" else "paper"]
                axes.text(left + share / 2, place, str(count), ha="center", va="center", color=ink, fontsize=8.5)
            left += share
    axes.set_yticks(range(len(reports)), [name for name, _ in reversed(reports)])
    axes.set_xlim(0, 1)
    axes.grid(False)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for label, colour in zip(("won", "tied", "lost"), colours, strict=True):
        axes.barh(0, 0, color=PALETTE[colour], label=label)
    return _legend(figure, 3)


def stage_times(seconds: dict[str, dict[str, float]]) -> Figure:
    """Stacked bars: the time of each stage, a row a round (or a stage before the rounds), in minutes."""
    figure, axes = _axes(max(1.8, 1.1 + 0.3 * len(seconds)))
    colours = {"reward": "muted", "gen": "blue", "score": "green", "train": "orange"}
    done: set[str] = set()
    for place, stages in enumerate(seconds.values()):
        left = 0.0
        for stage, time in stages.items():
            label, colour = None if stage in done else stage, PALETTE[colours.get(stage, "purple")]
            axes.barh(place, time / 60, left=left, color=colour, height=0.65, label=label)
            done.add(stage)
            left += time / 60
    axes.set_yticks(range(len(seconds)), list(seconds))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("minutes")
    return _legend(figure, 5)
