"""Reads `cases.parquet` of `ple cases` for the report: the same query, answered by several policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ple_data.report.pairs import clipped, visible
from schemas import tables


def read_cases(path: Path) -> list[dict[str, Any]]:
    """By query, in the file's order: x, kind (or None) and answers, each with label, y and a note for people.

    Raises DamagedError where the file is missing or is no table of cases.
    """
    by_query: dict[str, dict[str, Any]] = {}
    for row in tables.read_table(path, "cases").to_pylist():
        case: dict[str, Any] = {"x": clipped(row["x"]), "kind": row["kind"] and visible(row["kind"]), "answers": []}
        rewards = [f"reward {reward:.3g}" for reward in row["rewards"]]
        by_query.setdefault(row["query_id"], case)["answers"].append(
            {
                "label": visible(row["label"]),
                "y": clipped(row["y"]),
                "note": ", ".join([f"{row['tokens']} tokens", row["finish"], *rewards]),
            }
        )
    return list(by_query.values())
