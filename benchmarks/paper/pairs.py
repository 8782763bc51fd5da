"""Answers of the start policy beside those of a trained one, as a page: drawn by a seed, none selected.

    python -m benchmarks.paper.pairs OUTPUT/eval/unseen/seed=0/LABEL --output pairs.md

reads an evaluation that the frontier left in its --output. The numbers are both rewards. Samples nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import polars as pl

from benchmarks.paper.pages import plain, sample_queries
from benchmarks.paper.points import BASE, read_point
from benchmarks.paper.tables import wrapped
from schemas.files import write_atomic

COUNT = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, help="folder with eval.json and eval.parquet")
    parser.add_argument("--output", type=Path, required=True, help="the page")
    options = parser.parse_args()
    lines = page(options.evaluation)
    write_atomic(options.output, "\n".join(line for long in lines for line in wrapped(long)) + "\n")


def page(evaluation: Path) -> list[str]:
    label = evaluation.name
    policies = {name: read_point(evaluation, own, 0, {}) for name, own in (("start", BASE), ("trained", label))}
    rows = {name: point.rows for name, point in policies.items()}
    kl = policies["trained"].metrics["kl"]["mean"]
    lines = [
        f"# {COUNT} random pairs of answers: the start policy, and {label}",
        "",
        f"`{label}` is at a KL of {kl:.1f} nats a response. Queries were drawn by a seed, nothing was selected. "
        "*judge* is the unseen one, *reward* that which trained.",
    ]
    for number, query in enumerate(sample_queries(rows["start"]["query_id"].to_list(), COUNT), start=1):
        x = rows["start"].row(by_predicate=pl.col("query_id") == query, named=True)["x"]
        lines += ["", f"## {number}", "", f"> {plain(x)}", "", "| policy | judge | reward | answer |"]
        lines.append("| --- | --- | --- | --- |")
        for name, own in rows.items():
            row = own.row(by_predicate=pl.col("query_id") == query, named=True)
            lines.append(f"| {name} | {row['judge']:.2f} | {row['reward']:.2f} | {plain(row['y'])} |")
    return lines


if __name__ == "__main__":
    main()
