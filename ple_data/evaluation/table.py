"""What `ple eval` prints: its report as tables for a terminal of 100 columns. Returns text and computes nothing."""

from collections.abc import Mapping

from ple_data.common.terminal import WIDTH, display_width, printable, text_table
from schemas.reports import Estimate, EvalReport

_COLUMNS = {
    "entropy": ("entropy", 3),
    "kl": ("KL", 2),
    "mean_logps_first": ("logp first", 3),
    "perplexity": ("perplexity", 2),
    "bleu": ("BLEU", 2),
    "length": ("tokens", 1),
    "truncated": ("cut", 3),
    "distinct_1": ("distinct-1", 3),
    "distinct_2": ("distinct-2", 3),
}
"""By metric: its title, and the digits behind the point; rewards have 2."""


def format_report(report: EvalReport) -> str:
    """The metrics of each policy, then the paired differences, with a legend."""
    measured = report.policies[0].metrics
    trained = {f"reward:{use.name}": use.trained for use in report.reward_models}
    rewards = [name for name in measured if name in trained]
    titles = {name: f"R{at}{' (trained)' * trained[name]}" for at, name in enumerate(rewards, start=1)}
    titles |= {name: title for name, (title, _) in _COLUMNS.items()}
    queries = max(estimate.count for estimate in measured.values())
    lines = [
        f"{queries} queries of {printable(report.queries)}; value [95 % interval over queries]",
        "",
        *_blocks({policy.label: policy.metrics for policy in report.policies}, titles),
    ]
    for baseline, rows in report.differences().items():
        lines += [
            "",
            f"Difference from {baseline} on the same queries (* its interval does not contain 0)",
            "",
            *_blocks(rows, titles, mark=True),
        ]
    lines.append("")
    for name in rewards:
        mark = ", which trained one of these policies" if trained[name] else ""
        by = printable(name.removeprefix("reward:"))
        lines.append(f"{titles[name].split()[0]:<11} mean reward by {by}{mark}")
    return "\n".join([*lines, *_legend(report, {name: estimate.count for name, estimate in measured.items()})])


def _legend(report: EvalReport, counts: Mapping[str, int]) -> list[str]:
    lines = []
    first = report.policies[0].label
    if "entropy" in counts:
        lines.append(f"{'entropy':<11} in nats a token, of the policy's own responses")
    if "kl" in counts:
        lines.append(f"{'KL':<11} to {first}, in nats a response, of the same")
        lines.append(f"{'logp first':<11} mean log-probability of a token of the same under {first}")
    if report.bleu_signature:
        lines.append(f"{'BLEU':<11} sacrebleu, 0 to 100: {report.bleu_signature}")
    if "perplexity" in counts:
        lines.append(f"{'perplexity':<11} of the references given x, by token")
    lines.append(f"{'tokens, cut':<11} mean length of a response, and the share that --max-new-tokens cut")
    if not {"bleu", "perplexity"} & counts.keys():
        lines.append("No references, so neither perplexity nor BLEU: --references names them.")
    lines += map(printable, report.left_out)
    for name in ("perplexity", "bleu"):
        if counts.get(name, counts["length"]) < counts["length"]:
            lines.append(f"{_COLUMNS[name][0]} is over the {counts[name]} queries that have a reference for it.")
    return lines


def _blocks(rows: Mapping[str, Mapping[str, Estimate]], titles: Mapping[str, str], mark: bool = False) -> list[str]:
    """A row a policy and a column a metric, in as many tables under one another as the width asks for."""
    first = ["", *rows]
    blocks: list[list[list[str]]] = []
    for name in next(iter(rows.values())):
        column = [titles[name], *[_cell(name, metrics[name], mark) for metrics in rows.values()]]
        if not blocks or _width([*blocks[-1], column]) > WIDTH:
            blocks.append([first])
        blocks[-1].append(column)
    lines: list[str] = []
    for block in blocks:
        head, *cells = zip(*block, strict=True)
        lines += [*([""] if lines else []), *text_table(head, cells, left=1)]
    return lines


def _cell(name: str, estimate: Estimate, mark: bool) -> str:
    digits = _COLUMNS[name][1] if name in _COLUMNS else 2
    value = _number(estimate.mean, digits)
    if estimate.count > 1:
        value += f" [{_number(estimate.low, digits)}, {_number(estimate.high, digits)}]"
    if mark:
        value += "*" if estimate.count > 1 and not estimate.low <= 0 <= estimate.high else " "
    return value


def _number(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}" if abs(value) < 1e5 else f"{value:.2e}"


def _width(columns: list[list[str]]) -> int:
    return sum(max(map(display_width, column)) for column in columns) + 2 * (len(columns) - 1)
