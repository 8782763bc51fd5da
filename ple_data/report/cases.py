"""Reads `cases.parquet` of `ple cases` for the report: the same query, answered by several policies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ple_data.report.pairs import clipped, visible
from schemas import tables
from schemas.errors import DamagedError


@dataclass(frozen=True)
class Cases:
    """By query, in the file's order: x, kind (or None) and answers, each with label, y, a note for people and its
    rewards, which are in the order of `reward_models`. `trained`: those of them that trained a policy.
    """

    queries: list[dict[str, Any]]
    reward_models: list[str]
    trained: list[str]


def read_cases(path: Path) -> Cases:
    """Raises DamagedError where the file is missing, is no table of cases or does not name its reward models."""
    found = tables.read_metadata(path, "cases")
    names = found.get("reward_models", [])
    by_query: dict[str, dict[str, Any]] = {}
    for row in tables.read_table(path, "cases").to_pylist():
        if len(row["rewards"]) != len(names):
            raise DamagedError(
                f"{path}: {len(row['rewards'])} rewards of {len(names)} reward models: run ple cases again"
            )
        case: dict[str, Any] = {"x": clipped(row["x"]), "kind": row["kind"] and visible(row["kind"]), "answers": []}
        by_query.setdefault(row["query_id"], case)["answers"].append(
            {
                "label": visible(row["label"]),
                "y": clipped(row["y"]),
                "note": f"{row['tokens']} tokens, {row['finish']}",
                "rewards": [f"{reward:.3g}" for reward in row["rewards"]],
            }
        )
    return Cases(list(by_query.values()), names, found.get("trained_with", []))
