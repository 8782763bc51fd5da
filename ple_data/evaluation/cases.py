"""`ple cases`: the same queries, harmful and everyday ones, answered by several models and shown side by side.

Answers and rewards are kept in the output directory, so that a rerun computes what is missing and no more. Model text
is escaped wherever it is shown.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ple_data.common.terminal import WIDTH, clipped, printable, shorten, shown, side_by_side
from ple_data.evaluation.answers import Answers, sample_answers
from ple_data.evaluation.policies import parse_policies
from ple_data.evaluation.references import by_query_id
from ple_data.evaluation.rewards import check_reward_models, score_answers
from ple_data.inputs.queries import TEXT_COLUMNS
from ple_data.inputs.readers import Rows, read_rows
from ple_data.storage.parquet import save_rows
from schemas.errors import UsageError
from schemas.options import Cases
from schemas.tables import CASES

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
    names = score_answers(answers, options, options.output)
    kinds = by_query_id(_kinds(rows), options.queries, options) if "kind" in rows.columns else {}
    found = [
        {name: row[name] for name in CASES.names if name in row}
        | {"label": each.policy.label, "policy": each.policy.name, "kind": kinds.get(row["query_id"])}
        for each in answers
        for row in each.rows
    ]
    trained = [n for n, spec in zip(names, options.reward_model, strict=True) if spec in options.trained_with]
    provenance = {"queries": options.queries, "reward_models": names, "trained_with": trained}
    save_rows(options.output / TABLE, "cases", found, provenance)
    return _format(answers, kinds, names, trained)


def _kinds(rows: Rows) -> list[str | None]:
    values = [row.get("kind") for row in rows.rows]
    for place, value in zip(rows.places, values, strict=True):
        if not isinstance(value, str | None):
            raise UsageError(f"{rows.source} {place}: kind is {value!r}, which is no text; correct or remove it")
    return values


def _format(
    answers: Sequence[Answers], kinds: Mapping[str, str | None], names: Sequence[str], trained: Sequence[str]
) -> str:
    by_query = [each.by_query() for each in answers]
    ids = list(dict.fromkeys(id for found in by_query for id in found))
    lines: list[str] = []
    for id in ids:
        cells = [
            _cell(each.policy.label, found[id][0]) for each, found in zip(answers, by_query, strict=True) if id in found
        ]
        x = next(found[id][0]["x"] for found in by_query if id in found)
        kind = f" ({kinds[id]})" if kinds.get(id) else ""
        lines += [
            shorten(printable(f"query {id}{kind}"), WIDTH),
            *clipped(printable(f"x: {x}"), WIDTH, _TEXT_LINES),
            "",
        ]
        for start in range(0, len(cells), ABREAST):
            group = cells[start : start + ABREAST]
            width = (WIDTH - 3 * (len(group) - 1)) // len(group)
            columns = [[shorten(title, width), *clipped(text, width, _TEXT_LINES)] for title, text in group]
            lines += [*side_by_side(columns, width), ""]
    for at, name in enumerate(names, start=1):
        mark = ", which trained one of these policies" if name in trained else ""
        lines.append(f"R{at}: reward by {printable(name)}{mark}")
    return "\n".join(lines).rstrip()


def _cell(label: str, row: Mapping[str, Any]) -> tuple[str, str]:
    """The title and the text of an answer."""
    rewards = [f"R{at} {reward:.3g}" for at, reward in enumerate(row["rewards"], start=1)]
    return ", ".join([f"{label}: {row['tokens']} tokens", row["finish"], *rewards]), shown(row["y"])
