"""The sections on what `ple eval` and `ple judge` measured: tables of metrics, and win rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ple_data.judge.results import PEOPLE, REWARD
from ple_data.report import figures, reading
from ple_data.report.pairs import visible
from ple_data.report.section import WIDE, Section, Table, label, side
from ple_data.report.sources import RewardModel
from schemas.reports import Estimate, EvalReport, JudgePart, JudgeReport

KL = "KL to the first policy, of each policy's own responses; 95 % intervals over queries."


def evaluations(reports: Sequence[tuple[str, EvalReport]], reward_models: Mapping[str, RewardModel]) -> Section:
    """Tables of values and of differences; `reward_models` by name, of all these reports."""
    section = Section("evaluation", "Evaluation")
    if not reports:
        section.missing.append("No evaluation given: ple eval … --output DIR, then ple report RUN --eval DIR.")
    titles = {f"reward:{name}": model.title for name, model in reward_models.items()}
    for place, (name, report) in enumerate(reports, start=1):
        folder = label(name, WIDE)
        signature = f" BLEU: {visible(report.bleu_signature)}." if report.bleu_signature else ""
        section.words.append(f"{folder}: queries {visible(report.queries)}.{signature}")
        section.missing += [f"{folder}: {visible(sentence)}." for sentence in report.left_out]
        found = {policy.label: policy.metrics for policy in report.policies}
        far = [(label(policy), own) for policy, own in found.items() if "kl" in own]
        if rewards := {name: title for name, title in titles.items() if any(name in own for _, own in far)}:
            picture = figures.rewards_by_kl(far, rewards)
            said = reading.rewards_by_kl(far, rewards)
            section.draw(f"rewards-by-kl-{place}", f"{folder}: reward against KL", KL, picture, said)
        section.tables.append(_metrics_table(f"{folder}: values with 95 % intervals over queries", found, titles))
        for baseline, differences in report.differences().items():
            what = f"{folder}: differences from {label(baseline, WIDE)}, paired on the same queries"
            section.tables.append(_metrics_table(what, differences, titles))
    used = {model.name for _, report in reports for model in report.reward_models}
    section.words += [model.legend for name, model in reward_models.items() if name in used]
    return section


def _metrics_table(caption: str, found: dict[str, dict[str, Estimate]], titles: Mapping[str, str]) -> Table:
    """A row a policy, a column a metric: first the rewards, with their titles."""
    measured = dict.fromkeys(metric for own in found.values() for metric in own)
    metrics = [*[metric for metric in titles if metric in measured], *[m for m in measured if m not in titles]]
    rows = [[label(policy, WIDE), *[_estimate(own.get(metric)) for metric in metrics]] for policy, own in found.items()]
    return Table(caption, ["policy", *[titles.get(metric) or visible(metric) for metric in metrics]], rows)


def _estimate(value: Estimate | None) -> str:
    if value is None:
        return "–"
    size = abs(value.mean)
    form = ".2e" if size >= 1e5 else ".2f" if size >= 10 else ".3f" if size >= 0.1 else ".4f"
    return f"{value.mean:{form}} [{value.low:{form}}, {value.high:{form}}]"


def judged(reports: Sequence[tuple[str, JudgeReport]]) -> Section:
    """Win rates, with a bar and a row for each comparison."""
    section = Section("win-rates", "Win rates")
    if not reports:
        section.missing.append("No verdicts given: ple judge A B … --output DIR, then ple report RUN --judge DIR.")
        return section
    section.draw(
        "win-rates",
        "Won, tied, lost",
        " ".join(["Verdicts by query.", *dict.fromkeys(_how_a_wins(report.judge) for _, report in reports)]),
        figures.win_rates([(_bar_label(report), report) for _, report in reports]),
        reading.win_rates([(f"{side(report.a)} against {side(report.b)}", report) for _, report in reports]),
    )
    head = ["A", "B", "judge", "won", "tied", "lost", "orders disagree", "unparsed", "win rate", "tokens",
            "people (kappa)"]  # fmt: skip
    rows = [
        [
            *[side(r.a), side(r.b), label(r.judge, WIDE), *_counts(r)],
            "–" if r.orders_disagree is None else str(r.orders_disagree),
            str(r.unparsed),
            _estimate(r.win_rate),
            str(r.prompt_tokens + r.completion_tokens),
            f"{r.annotators}" + (f" ({r.kappa:.2f})" if r.kappa is not None else ""),
        ]
        for _, r in reports
    ]
    section.tables.append(Table("Verdicts; the win rate with its 95 % interval", head, rows))
    for report in [report for _, report in reports if report.parts]:
        caption = f"{side(report.a)} against {side(report.b)}: verdicts by kind of query and by annotator"
        rows = [
            [f"{part.by} {label(part.name)}", *_counts(part), str(part.unparsed), _estimate(part.win_rate)]
            for part in report.parts
        ]
        section.tables.append(Table(caption, ["part", "won", "tied", "lost", "unparsed", "win rate"], rows))
    return section


def _counts(found: JudgeReport | JudgePart) -> list[str]:
    return [str(found.wins), str(found.ties), str(found.losses)]


def _how_a_wins(judge: str) -> str:
    kind = judge.partition(":")[0]
    if kind == PEOPLE:
        return "By people: A wins where more of them say so than anything else."
    if kind == REWARD:
        return "By a reward model: A wins with the higher reward."
    return "By a language model, asked in both orders: A wins where both say so (Figure 2 of the paper)."


def _bar_label(report: JudgeReport) -> str:
    unparsed = f"\nunparsed {report.unparsed}" if report.unparsed else ""
    return f"{side(report.a)}\nagainst {side(report.b)}\nby {label(report.judge, WIDE)}{unparsed}"
