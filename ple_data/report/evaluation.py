"""The sections on what `ple eval` and `ple judge` measured: tables of metrics, and win rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ple_data.judge.results import PEOPLE, REWARD
from ple_data.report import figures
from ple_data.report.pairs import visible
from ple_data.report.reward_models import RewardModel
from ple_data.report.section import Section, Table, label, side, wide_label
from schemas.reports import Estimate, EvalReport, JudgeReport


def evaluations(reports: Sequence[tuple[str, EvalReport]], reward_models: Mapping[str, RewardModel]) -> Section:
    """Tables of values and of differences; `reward_models` by name, of all these reports."""
    section = Section("evaluation", "Evaluation")
    if not reports:
        section.missing.append("No evaluation given: ple eval … --output DIR, then ple report RUN --eval DIR.")
    titles = {f"reward:{name}": model.title for name, model in reward_models.items()}
    for folder, report in reports:
        words = [f"{wide_label(folder)}: queries {visible(report.queries)}."]
        words += [f"BLEU: {visible(report.bleu_signature)}."] if report.bleu_signature else []
        section.words.append(" ".join(words))
        found = {policy.label: policy.metrics for policy in report.policies}
        what = f"{wide_label(folder)}: values with 95 % intervals over queries"
        section.tables.append(_metrics_table(what, found, titles))
        for baseline in dict.fromkeys(c.baseline for c in report.comparisons):
            differences: dict[str, dict[str, Estimate]] = {}
            for c in report.comparisons:
                if c.baseline == baseline:
                    differences.setdefault(c.label, {})[c.metric] = c.difference
            what = f"{wide_label(folder)}: differences from {wide_label(baseline)}, paired on the same queries"
            section.tables.append(_metrics_table(what, differences, titles))
    used = {model.name for _, report in reports for model in report.reward_models}
    section.words += [model.legend for name, model in reward_models.items() if name in used]
    return section


def _metrics_table(caption: str, found: dict[str, dict[str, Estimate]], titles: Mapping[str, str]) -> Table:
    """A row a policy, a column a metric: first the rewards, with their titles."""
    measured = dict.fromkeys(metric for own in found.values() for metric in own)
    metrics = [*[metric for metric in titles if metric in measured], *[m for m in measured if m not in titles]]
    rows = [[wide_label(policy), *[_estimate(own.get(metric)) for metric in metrics]] for policy, own in found.items()]
    return Table(caption, ["policy", *[titles.get(metric) or visible(metric) for metric in metrics]], rows)


def _estimate(value: Estimate | None) -> str:
    if value is None:
        return "–"
    if abs(value.mean) >= 1e5:
        return f"{value.mean:.2e} [{value.low:.2e}, {value.high:.2e}]"
    digits = 2 if abs(value.mean) >= 10 else 4 if abs(value.mean) < 0.1 else 3
    return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def judged(reports: Sequence[tuple[str, JudgeReport]]) -> Section:
    section = Section("win-rates", "Win rates")
    if not reports:
        section.missing.append("No verdicts given: ple judge A B … --output DIR, then ple report RUN --judge DIR.")
        return section
    section.draw(
        "win-rates",
        "Won, tied, lost",
        " ".join(["Verdicts by query.", *dict.fromkeys(_how_a_wins(report.judge) for _, report in reports)]),
        figures.win_rates([(_bar_label(report), report) for _, report in reports]),
    )
    head = ["A", "B", "judge", "won", "tied", "lost", "orders disagree", "unparsed", "win rate", "tokens",
            "people (kappa)"]  # fmt: skip
    rows = [
        [
            *[side(r.a), side(r.b), wide_label(r.judge)],
            *[str(count) for count in (r.wins, r.ties, r.losses)],
            "–" if r.orders_disagree is None else str(r.orders_disagree),
            str(r.unparsed),
            _estimate(r.win_rate),
            str(r.prompt_tokens + r.completion_tokens),
            f"{r.annotators}" + (f" ({r.kappa:.2f})" if r.kappa is not None else ""),
        ]
        for _, r in reports
    ]
    section.tables.append(Table("Verdicts; the win rate with its 95 % interval", head, rows))
    section.tables += [_judge_parts(report) for _, report in reports if report.parts]
    return section


def _how_a_wins(judge: str) -> str:
    kind = judge.partition(":")[0]
    if kind == PEOPLE:
        return "By people: A wins where more of them say so than anything else."
    if kind == REWARD:
        return "By a reward model: A wins with the higher reward."
    return "By a language model, asked in both orders: A wins where both say so (Figure 2 of the paper)."


def _bar_label(report: JudgeReport) -> str:
    unparsed = f"\nunparsed {report.unparsed}" if report.unparsed else ""
    return f"{side(report.a)}\nagainst {side(report.b)}\nby {wide_label(report.judge)}{unparsed}"


def _judge_parts(report: JudgeReport) -> Table:
    rows = [
        [
            f"{part.by} {label(part.name)}",
            *[str(count) for count in (part.wins, part.ties, part.losses, part.unparsed)],
            _estimate(part.win_rate),
        ]
        for part in report.parts
    ]
    caption = f"{side(report.a)} against {side(report.b)}: verdicts by kind of query and by annotator"
    return Table(caption, ["part", "won", "tied", "lost", "unparsed", "win rate"], rows)
