"""What `ple inspect` and the trainer's dry run print: statistics by round, margins, pairs side by side.

Gives text and prints nothing. Model text is data: what is not printable is escaped, so that it cannot steer a terminal.
"""

import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import polars as pl

from ple_data.common.secrets import public
from ple_data.common.terminal import WIDTH, clipped, printable, shorten, shown, side_by_side, text_table
from ple_data.partition import QUANTILES, own_tau, partition, reward_statistics, round_statistics, warnings
from ple_data.selection import ARMS
from ple_data.storage.store import collect, open_store
from schemas import tables
from schemas.errors import UsageError

DEFAULT_ROWS = 5
_TEXT_LINES = 12  # lines of a text that are shown
_BINS = 40
_BARS = " ▁▂▃▄▅▆▇█"
_SOURCES = ["policy", "principle", "reward_model"]
_SHOWN = ["query_id", "round", "sample", "s", "s_prompt", "margin", "set", "w", "c", "c_prompt"]
_TEXTS = ["x", "y", "y_prompt"]
_ARM_FLAGS = ["y_finish", "y_prompt_finish", "len_y", "len_y_prompt"]


def inspect(
    data: Path,
    tau0: float = 0.2,
    alpha: float = 0.9,
    sort: str | None = None,
    rows: int = 0,
    as_json: bool = False,
    beta: float | None = None,
) -> str:
    """The text (or one JSON object) about a data directory: counts, statistics by round at tau_t, and some pairs.

    With `beta`, where the median pair of a round comes to rest under an objective that stops by itself.
    With `rows` that many pairs follow, with `sort` = "margin" those of the largest margin first.
    Raises UsageError where nothing is committed, DamagedError on a shard that cannot be read.
    """
    store = open_store(data)
    shards = {kind: store.shards(kind) for kind in tables.STORED}
    if not any(shards.values()):
        if begun := store.manifest_paths():
            t = store.read_manifest(begun[0]).round
            wait = "wait, or run the same ple-gen command again if it has stopped"
            raise UsageError(f"{data}: no rows yet: round {t} was begun, but no unit of it is whole; {wait}")
        raise UsageError(f"{data}: no committed rows: run ple-gen first, or check the path")
    counts = [
        {"round": round, "kind": kind, "shards": len(sizes), "rows": sum(sizes)}
        for kind, committed in shards.items()
        for round, of_round in groupby(committed, key=lambda shard: shard.round)
        for sizes in [[shard.rows for shard in of_round]]
    ]
    pairs = store.scan("pairs")
    statistics = round_statistics(pairs, tau0, alpha)
    rows = rows or (DEFAULT_ROWS if sort else 0)
    found = {"data": str(data), "tau0": tau0, "alpha": alpha, "counts": counts, "beta": beta}
    found |= {
        "rounds": statistics.to_dicts(),
        "warnings": warnings(statistics),
        "sources": _sources(pairs),
        "unanswered": _unanswered(pairs),
        "rewards": reward_statistics(pairs, store.reward_models()),
        "histogram": _histogram(pairs),
        "rows": _rows(pairs, tau0, alpha, sort, rows) if rows else [],
    }
    return json.dumps(found, indent=1, allow_nan=False) if as_json else _format(found)


def _sources(pairs: pl.LazyFrame) -> list[dict[str, Any]]:
    """By round: the distinct policies, principles and reward models of the rows."""
    by_round = pairs.group_by("round").agg(pl.col(_SOURCES).unique()).sort("round")
    return collect(by_round.with_columns(pl.col(_SOURCES).list.sort())).to_dicts()


def _unanswered(pairs: pl.LazyFrame) -> list[dict[str, Any]]:
    """By round, where thoughts were taken off: how many responses of each arm are a thought without an end."""
    arms = [(~pl.col(f"{arm}_answered")).sum().alias(arm) for arm in ARMS]
    known = pairs.filter(pl.col("y_answered").is_not_null())
    return collect(known.group_by("round").agg(pl.len().alias("rows"), *arms).sort("round")).to_dicts()


def _histogram(pairs: pl.LazyFrame) -> dict[str, Any]:
    """Margins counted in equal bins from the smallest to the largest: {low, high, counts: {round: [rows]}}."""
    margin = partition(0.0)[0]
    ends = collect(pairs.select(margin.min().alias("low"), margin.max().alias("high"))).row(0, named=True)
    low, high = ends["low"], ends["high"]
    if low is None:
        return {"low": None, "high": None, "counts": {}}
    place = ((margin - low) / ((high - low) or 1.0) * _BINS).floor().clip(0, _BINS - 1).cast(pl.Int64)
    found = collect(pairs.group_by("round", place.alias("bin")).agg(pl.len().alias("rows")).sort("round", "bin"))
    counts: dict[str, list[int]] = {}
    for round, bin, rows in found.iter_rows():
        counts.setdefault(str(round), [0] * _BINS)[bin] = rows
    return {"low": low, "high": high, "counts": counts}


def _rows(pairs: pl.LazyFrame, tau0: float, alpha: float, sort: str | None, rows: int) -> list[dict[str, Any]]:
    """Pairs with their set at their own round's tau; the largest margins first, or in the order of their keys."""
    if sort not in (None, "margin"):
        raise UsageError(f"--sort {sort}: pairs can be sorted by margin")
    threshold = own_tau(pairs, tau0, alpha)
    lengths = [pl.col(f"{arm}_ids").list.len().alias(f"len_{arm}") for arm in ARMS]
    order = [*(["margin"] if sort else []), "round", "query_id", "sample"]
    frame = pairs.with_columns(*partition(threshold), *lengths, threshold.alias("tau"))
    first = frame.sort(order, descending=[name == "margin" for name in order]).head(rows)
    return collect(first.select(*_SHOWN, "tau", *_TEXTS, *_ARM_FLAGS)).to_dicts()


# Text


def format_statistics(statistics: pl.DataFrame, *, tau0: float, alpha: float, at_round: int | None = None) -> str:
    """The tables of `round_statistics` for a terminal of 100 columns, followed by the warnings.

    `at_round` is that of `round_statistics`: the round whose tau was used for all rows.
    """
    lines = _statistics_lines(statistics.to_dicts(), tau0, alpha, at_round)
    return "\n".join([*lines, *[f"warning: {message}" for message in warnings(statistics)]])


def rest(medians: Iterable[tuple[int, float]], beta: float) -> str:
    """The line that says at which Delta a pair of the median margin stops; medians: by round, in the reward's units."""
    places = ", ".join(f"{_number(median / beta)} in round {round}" for round, median in medians)
    return (
        f"beta = {beta:g}: the median margin comes to rest where Delta = margin / beta is {places} (nats a token with "
        "--form means, a response with sums)"
    )


def _statistics_lines(rounds: list[dict[str, Any]], tau0: float, alpha: float, at_round: int | None) -> list[str]:
    which = "its own round" if at_round is None else f"round {at_round}"
    quantiles = [f"{round(100 * q)} %" for q in QUANTILES.values()]
    rewards = [
        [r["round"], r["rows"], _number(r["mean_s"]), _number(r["mean_s_prompt"]), _number(r["mean_margin"])]
        + [_number(r[name]) for name in QUANTILES]
        + [_number(r["tau"]), _share(r["rank_share"]), _share(r["lowered_share"])]
        for r in rounds
    ]
    responses = [
        [r["round"]]
        + [_share(r[f"{what}_{arm}"]) for what in ("truncated", "empty") for arm in ARMS]
        + [f"{r[f'mean_len_{arm}']:.1f}" for arm in ARMS]
        for r in rounds
    ]
    return [
        "Rewards: means; quantiles of the margin s_prompt - s; share in the rank set, where the margin is",
        f"above the tau of {which} (tau_t = {tau0:g} * {alpha:g}^t); share where the principle lowered the reward",
        *text_table(["round", "rows", "s", "s_prompt", "margin", *quantiles, "tau", "rank", "lowered"], rewards),
        "",
        "Responses: share cut by length, share empty, mean length in tokens",
        *text_table(["round", *[f"{what} {arm}" for what in ("cut", "empty", "tokens") for arm in ARMS]], responses),
    ]


def _reward_lines(rewards: list[dict[str, Any]]) -> list[str]:
    header = ["", "reward by", "y", "y_prompt", *[f"with {at + 1}" for at in range(len(rewards))]]
    rows = [
        [at, shorten(printable(public(each["model"])), 50), _number(each["mean_y"]), _number(each["mean_y_prompt"])]
        + ["–" if value is None else f"{value:.3f}" for value in each["correlations"]]
        for at, each in enumerate(rewards, start=1)
    ]
    return [
        "Rewards that were put together: means, and correlations over all responses",
        *text_table(header, rows, left=2),
    ]


def _format(found: dict[str, Any]) -> str:
    parts = [[f"{printable(found['data'])}: committed rows"], _count_lines(found["counts"])]
    if found["rounds"]:
        parts += [[""], _statistics_lines(found["rounds"], found["tau0"], found["alpha"], None)]
        if found["beta"] is not None:
            parts += [["", rest([(r["round"], r["margin_q50"]) for r in found["rounds"]], found["beta"])]]
        if unanswered := found["unanswered"]:
            parts += [[f"Thoughts without an end, so no answer: {_unanswered_words(unanswered)}"]]
        if found["rewards"]:
            parts += [["", *_reward_lines(found["rewards"])]]
        parts += [[""], _histogram_lines(found["histogram"]), [""], _source_lines(found["sources"])]
        parts += [[f"warning: {message}" for message in found["warnings"]]]
    else:
        parts += [["no pairs yet: ple-score makes them from the responses"]]
    parts += [["", *_pair_lines(row)] for row in found["rows"]]
    return "\n".join(line for part in parts for line in part)


def _unanswered_words(rounds: list[dict[str, Any]]) -> str:
    return "; ".join(f"round {r['round']}: {r['y']} y and {r['y_prompt']} y_prompt of {r['rows']}" for r in rounds)


def _count_lines(counts: list[dict[str, Any]]) -> list[str]:
    by_round: dict[int, dict[str, int]] = {}
    for count in counts:
        by_round.setdefault(count["round"], {})[count["kind"]] = count["rows"]
    kinds = [kind for kind in tables.STORED if any(count["kind"] == kind for count in counts)]
    rows = [[t, *[by_round[t].get(kind, 0) for kind in kinds]] for t in sorted(by_round)]
    return text_table(["round", *kinds], rows)


def _histogram_lines(found: dict[str, Any]) -> list[str]:
    low, high = _number(found["low"]), _number(found["high"])
    lines = [f"Margins from {low} to {high}; a bar's height is its share of the round's largest"]
    for round, counts in found["counts"].items():
        bars = "".join(_BARS[-(-count * (len(_BARS) - 1) // max(counts))] for count in counts)
        lines.append(f"{round:>5}  |{bars}|")
    return lines


def _source_lines(sources: list[dict[str, Any]]) -> list[str]:
    lines = ["Sources, from the round on in which they change"]
    before: dict[str, list[str]] = {}
    for source in sources:
        for name in _SOURCES:
            first, *others = source[name]
            more = f"  (+{len(others)} more)" if others else ""
            if source[name] != before.get(name):
                lines.append(f"{source['round']:>5}  {name:<12}  {shorten(printable(public(first)), 70)}{more}")
        before = source
    return lines


def _pair_lines(row: dict[str, Any]) -> list[str]:
    """One pair: what was decided, then x, then both responses side by side."""
    sign = ">" if row["set"] == "rank" else "<="
    half = (WIDTH - 3) // 2
    arms = [
        [
            f"{arm}: {reward} = {row[reward]:.4g}, {row[f'len_{arm}']} tokens, {row[f'{arm}_finish']}",
            *clipped(shown(row[arm]), half, _TEXT_LINES),
        ]
        for arm, reward in ARMS.items()
    ]
    return [
        shorten(f"query {printable(row['query_id'])}, round {row['round']}, sample {row['sample']}", WIDTH),
        f"margin {row['margin']:.4g} {sign} tau {row['tau']:.4g}: {row['set']} "
        f"(in Eq. 6 c = {row['c']:.4g}, c_prompt = {row['c_prompt']:.4g})",
        *clipped(f"x: {printable(row['x'])}", WIDTH, _TEXT_LINES),
        *side_by_side(arms, half),
    ]


def _number(value: float) -> str:
    """Three decimals, or three digits where that is too wide for a column."""
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.2e}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"
