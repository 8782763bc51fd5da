"""`ple cases`: the same queries, harmful and everyday ones, answered by several models and shown side by side.

Answers and rewards are kept in the output directory, so that a rerun computes what is missing and no more. Model text
is escaped wherever it is shown.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ple_data.common.terminal import WIDTH, clipped, printable, shorten, shown, side_by_side
from ple_data.evaluation.answers import Answers, sample_answers
from ple_data.evaluation.policies import parse_policies
from ple_data.evaluation.references import by_query_id, optional_texts
from ple_data.evaluation.rewards import check_reward_models, score_answers
from ple_data.inputs.queries import TEXT_COLUMNS
from ple_data.inputs.readers import read_rows
from ple_data.storage.parquet import save_rows
from schemas.options import Cases
from schemas.reports import RewardModelUse

TABLE = "cases.parquet"
ABREAST = 3
"""Answers beside one another; more of them go below."""
_TEXT_LINES = 20  # lines of a text that are shown


def cases(options: Cases) -> str:
    """Answer `queries` with each policy (`NAME=MODEL[,ADAPTER]`), write cases.parquet and give the text to print.

    queries: rows with `query` (or what `ple-gen` reads), and `id` and `kind` where there are any. Raises UsageError.
    """
    policies = parse_policies(options.policy)
    check_reward_models(options)
    rows = read_rows(options.queries, options.split)
    named = options.query_column is not None or {*TEXT_COLUMNS, "messages"} & set(rows.columns)
    if "query" in rows.columns and not named:
        options = options.but(query_column="query")
    answers = sample_answers(policies, options.output, options.queries, options)
    uses = score_answers(answers, options, options.output)
    kinds = by_query_id(optional_texts(rows, "kind"), options.queries, options) if "kind" in rows.columns else {}
    found = [row | {"kind": kinds.get(row["query_id"])} for each in answers for row in each.rows]
    provenance = {
        "queries": options.queries,
        "reward_models": [use.name for use in uses],
        "trained_with": [use.name for use in uses if use.trained],
    }
    save_rows(options.output / TABLE, "cases", found, provenance)
    return _format(answers, kinds, uses)


def _format(answers: Sequence[Answers], kinds: Mapping[str, str | None], uses: Sequence[RewardModelUse]) -> str:
    by_query: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for each in answers:
        for id, rows in each.by_query().items():
            by_query.setdefault(id, []).append((each.policy.label, rows[0]))
    lines: list[str] = []
    for id, found in by_query.items():
        kind = f" ({kinds[id]})" if kinds.get(id) else ""
        lines.append(shorten(printable(f"query {id}{kind}"), WIDTH))
        lines += [*clipped(printable(f"x: {found[0][1]['x']}"), WIDTH, _TEXT_LINES), ""]
        for start in range(0, len(found), ABREAST):
            group = found[start : start + ABREAST]
            width = (WIDTH - 3 * (len(group) - 1)) // len(group)
            columns = [
                [shorten(_title(label, row), width), *clipped(shown(row["y"]), width, _TEXT_LINES)]
                for label, row in group
            ]
            lines += [*side_by_side(columns, width), ""]
    for at, use in enumerate(uses, start=1):
        mark = ", which trained one of these policies" if use.trained else ""
        lines.append(f"R{at}: reward by {printable(use.name)}{mark}")
    return "\n".join(lines).rstrip()


def _title(label: str, row: Mapping[str, Any]) -> str:
    rewards = [f"R{at} {reward:.3g}" for at, reward in enumerate(row["rewards"], start=1)]
    return ", ".join([f"{label}: {row['tokens']} tokens", row["finish"], *rewards])
