"""What `ple eval` prints: its report as tables for a terminal of 100 columns. Returns text and computes nothing."""

from collections.abc import Mapping, Sequence

from ple_data.common.terminal import WIDTH, display_width, printable, text_table
from schemas.reports import Comparison, Estimate, EvalReport

_TITLES = {
    "perplexity": "perplexity",
    "bleu": "BLEU",
    "length": "tokens",
    "truncated": "cut",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
}
_DIGITS = {"perplexity": 2, "bleu": 2, "length": 1, "truncated": 3, "distinct_1": 3, "distinct_2": 3}


def format_report(report: EvalReport) -> str:
    """The metrics of each policy, then the paired differences, with a legend."""
    titles = _titles(report)
    counts = {name: estimate.count for name, estimate in report.policies[0].metrics.items()}
    lines = [
        f"{max(counts.values())} queries of {printable(report.queries)}; value [95 % interval over queries]",
        "",
        *_blocks([(policy.label, policy.metrics) for policy in report.policies], titles),
    ]
    by_baseline: dict[str, dict[str, dict[str, Estimate]]] = {}
    for comparison in report.comparisons:
        _group(by_baseline, comparison)
    for baseline, rows in by_baseline.items():
        lines += [
            "",
            f"Difference from {baseline} on the same queries (* its interval does not contain 0)",
            "",
            *_blocks(list(rows.items()), titles, mark=True),
        ]
    return "\n".join([*lines, "", *_legend(report, titles, counts)])


def _group(found: dict[str, dict[str, dict[str, Estimate]]], comparison: Comparison) -> None:
    rows = found.setdefault(comparison.baseline, {})
    rows.setdefault(comparison.label, {})[comparison.metric] = comparison.difference


def _titles(report: EvalReport) -> dict[str, str]:
    """Short column titles by metric: R1, R2, ... for the reward models, in the order of the metrics."""
    trained = _trained(report)
    rewards = [name for name in report.policies[0].metrics if name in trained]
    marks = {name: " (trained)" if trained[name] else "" for name in rewards}
    return {name: f"R{at}{marks[name]}" for at, name in enumerate(rewards, start=1)} | _TITLES


def _trained(report: EvalReport) -> dict[str, bool]:
    """Whether its rewards trained a policy, by metric name of each reward model."""
    return {f"reward:{use.name}": use.trained for use in report.reward_models}


def _legend(report: EvalReport, titles: Mapping[str, str], counts: Mapping[str, int]) -> list[str]:
    trained = _trained(report)
    lines = [
        f"{titles[name].split()[0]:<11} mean reward by {printable(name.removeprefix('reward:'))}"
        + (", which trained one of these policies" if trained[name] else "")
        for name in titles
        if name in trained
    ]
    if report.bleu_signature:
        lines.append(f"{'BLEU':<11} sacrebleu, 0 to 100: {report.bleu_signature}")
    if "perplexity" in counts:
        lines.append(f"{'perplexity':<11} of the references given x, by token")
    lines.append(f"{'tokens, cut':<11} mean length of a response, and the share that --max-new-tokens cut")
    if "bleu" not in counts:
        lines.append("No references, so neither perplexity nor BLEU: --references names them.")
    for name in ("perplexity", "bleu"):
        if counts.get(name, counts["length"]) < counts["length"]:
            lines.append(f"{titles[name]} is over the {counts[name]} queries that have a reference for it.")
    return lines


def _blocks(
    rows: Sequence[tuple[str, Mapping[str, Estimate]]], titles: Mapping[str, str], mark: bool = False
) -> list[str]:
    """A row a policy and a column a metric, in as many tables under one another as the width asks for."""
    first = ["", *[label for label, _ in rows]]
    metrics = list(rows[0][1])
    columns = [[titles[name], *[_cell(name, metrics_of[name], mark) for _, metrics_of in rows]] for name in metrics]
    blocks: list[list[list[str]]] = []
    for column in columns:
        if not blocks or _width([first, *blocks[-1], column]) > WIDTH:
            blocks.append([])
        blocks[-1].append(column)
    lines: list[str] = []
    for block in blocks:
        cells = list(zip(first, *block, strict=True))
        lines += [*([""] if lines else []), *text_table(cells[0], cells[1:], left=1)]
    return lines


def _cell(name: str, estimate: Estimate, mark: bool) -> str:
    digits = _DIGITS.get(name, 2)
    value = _number(estimate.mean, digits)
    if estimate.count > 1:
        value += f" [{_number(estimate.low, digits)}, {_number(estimate.high, digits)}]"
    if mark:
        value += "*" if estimate.count > 1 and not estimate.low <= 0 <= estimate.high else " "
    return value


def _number(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}" if abs(value) < 1e5 else f"{value:.2e}"


def _width(columns: Sequence[Sequence[str]]) -> int:
    return sum(max(map(display_width, column)) for column in columns) + 2 * (len(columns) - 1)
