"""Verdicts counted: win rates with intervals, the report, the table of verdicts, and the text for a terminal.

A verdict is a win where A is better, a tie, a lose, or unparsed. Decides none.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ple_data.common.terminal import printable, shorten, text_table
from ple_data.judge.sources import Pair, Pairs
from ple_data.storage.parquet import save_rows
from schemas.errors import UsageError
from schemas.files import write_atomic
from schemas.records import read_record
from schemas.reports import Estimate, JudgePart, JudgeReport

Outcome = Literal["win", "tie", "lose", "unparsed"]
VALUES: dict[Outcome, float] = {"win": 1.0, "tie": 0.5, "lose": 0.0}
RESAMPLES = 10_000
REPORT, TABLE, PAGE_RECORD = "judge.json", "verdicts.parquet", "page.json"
PEOPLE, REWARD = "people", "reward"
"""Kinds of judge, as a report's `judge` begins; any other is a language model."""
_NAME_WIDTH = 36  # columns of a terminal for the name of a part


@dataclass(frozen=True)
class Verdict:
    """What was decided on a pair, in all or by one annotator; details: further columns of the table of verdicts."""

    pair: Pair
    outcome: Outcome
    annotator: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


def win_rate(outcomes: Sequence[Outcome], seed: int) -> Estimate | None:
    """(wins + ties / 2) / (wins + ties + losses) with its 95 % percentile bootstrap interval over queries (Efron 1979).

    Queries have one of three values, so a resample is a multinomial draw of their counts. None without any verdict.
    """
    counts = Counter(outcomes)
    numbers = np.array([counts[outcome] for outcome in VALUES])
    total = int(numbers.sum())
    if total == 0:
        return None
    values = np.array(list(VALUES.values()))
    drawn = np.random.default_rng(seed).multinomial(total, numbers / total, size=RESAMPLES)
    low, high = np.quantile(drawn @ values / total, [0.025, 0.975])
    return Estimate(mean=float(numbers @ values / total), low=float(low), high=float(high), count=total)


def conclude(output: Path, verdicts: Sequence[Verdict], pairs: Pairs, *, judge: str, seed: int, **more: Any) -> str:
    """Write the table of verdicts, then the report on them: those that count in all and by kind, and those of each
    annotator. Gives the report as text. more: further fields of schemas.reports.JudgeReport. Raises PleError.
    """
    groups: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for verdict in verdicts:
        by, name = ("kind", verdict.pair.kind) if verdict.annotator is None else ("annotator", verdict.annotator)
        if name is not None:
            groups[by, name].append(verdict.outcome)
    in_order = sorted(groups, key=lambda group: (group[0] != "kind", group[1]))
    report = JudgeReport(
        a=pairs.a,
        b=pairs.b,
        judge=judge,
        **_counts([verdict.outcome for verdict in verdicts if verdict.annotator is None], seed),
        parts=[JudgePart.model_validate({"by": g[0], "name": g[1], **_counts(groups[g], seed)}) for g in in_order],
        only_a=pairs.only_a,
        only_b=pairs.only_b,
        **{"prompt_tokens": 0, "completion_tokens": 0, **more},
    )
    rows = [
        vars(verdict.pair) | verdict.details | {"annotator": verdict.annotator, "verdict": verdict.outcome}
        for verdict in verdicts
    ]
    save_rows(output / TABLE, "verdicts", rows, {"a": pairs.a, "b": pairs.b, "judge": judge})
    write_atomic(output / REPORT, report.to_json())
    return shown(report)


def _counts(outcomes: Sequence[Outcome], seed: int) -> dict[str, Any]:
    return {
        "wins": outcomes.count("win"),
        "ties": outcomes.count("tie"),
        "losses": outcomes.count("lose"),
        "unparsed": outcomes.count("unparsed"),
        "win_rate": win_rate(outcomes, seed),
    }


def refuse_other(output: Path, a: str, b: str, judge: str, template: str | None) -> None:
    """Raise UsageError where `output` holds the report of another comparison or judge, or people's page."""
    if judge != PEOPLE and (output / PAGE_RECORD).exists():
        raise UsageError(f"{output} holds an annotation page, whose verdicts will lie there: give another --output")
    path = output / REPORT
    if not path.exists():
        return
    found = read_record(JudgeReport, path, "remove it, or give another --output")
    wanted = {
        "A": (found.a, a),
        "B": (found.b, b),
        "judge": (found.judge, judge),
        "template": (found.template, template),
    }
    differ = [
        f"{name} {there}, not {here}"
        for name, (there, here) in wanted.items()
        if there != here and not (name in ("A", "B") and _same_source(there or "", here or ""))
    ]
    if differ:
        raise UsageError(
            f"{output} holds the verdicts of {'; of '.join(differ)}: give another --output, or move {REPORT} and "
            f"{TABLE} away"
        )


def _same_source(spec: str, other: str) -> bool:
    """Whether two spellings (`./a.jsonl`, `a.jsonl`) name one file or one choice of a data directory."""
    (path, _, choice), (other_path, _, other_choice) = spec.partition("#"), other.partition("#")
    return spec == other or (os.path.abspath(path), choice) == (os.path.abspath(other_path), other_choice)


def shown(found: JudgeReport) -> str:
    """The report for a terminal."""
    parts: list[tuple[str, JudgeReport | JudgePart]] = [("all", found)]
    parts += [(f"{part.by} {part.name}", part) for part in found.parts]
    rows = [
        [shorten(printable(name), _NAME_WIDTH), c.wins, c.ties, c.losses, c.unparsed, c.win_rate or "none"]
        for name, c in parts
    ]
    lines = [
        f"A: {printable(found.a)}",
        f"B: {printable(found.b)}",
        f"judge: {printable(found.judge)}",
        "",
        *text_table(["", "A wins", "ties", "B wins", "unparsed", "A's win rate, 95 % interval"], rows),
    ]
    if found.orders_disagree is not None:
        parsed = found.wins + found.ties + found.losses
        lines.append(f"the two orders disagree on {found.orders_disagree} of {parsed} queries, counted as ties")
    if found.annotators > 1:
        kappa = "not defined" if found.kappa is None else f"{found.kappa:.2f}"
        lines.append(
            f"Fleiss' kappa: {kappa} ({found.annotators} annotators, {found.kappa_queries} queries that all judged)"
        )
    if found.sides:
        share = f"{100 * found.first_side / found.sides:.0f} %"
        lines.append(f"the response shown first was chosen in {found.first_side} of {found.sides} verdicts ({share})")
    if found.prompt_tokens or found.completion_tokens:
        lines.append(f"tokens paid for: {found.prompt_tokens} read, {found.completion_tokens} written")
    return "\n".join(lines)
