"""Plain answers of several policies to the same queries: sampled and kept, or taken from a store. Measures nothing.

Each policy's answers lie in a store of their own, OUTPUT/answers/DIGEST, whose name says what they were asked:
the same question is never sampled twice, and another one never meets them.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ple_data.digests import json_digest
from ple_data.generate import generate
from ple_data.policies import NamedPolicy
from ple_data.readers import read_rows
from ple_data.store import Store, collect
from schemas.errors import UsageError

_COLUMNS = ["query_id", "round", "sample", "x", "y", "x_ids", "reference", "policy"]
_NOT_ASKED = ("engine", "engine_args", "dtype")
"""How something is sampled and not what: the store's manifest does not freeze these either."""


@dataclass(frozen=True)
class Answers:
    """One policy's answers. A row is a dict of query_id, sample, x, x_ids, y, tokens, finish and reference."""

    policy: NamedPolicy
    rows: list[dict[str, Any]]

    def by_query(self) -> dict[str, list[dict[str, Any]]]:
        """The rows of each query, queries and rows in the order in which they were asked."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            found.setdefault(row["query_id"], []).append(row)
        return found


def sample_answers(policies: Sequence[NamedPolicy], output: Path, generation: Mapping[str, Any]) -> list[Answers]:
    """Each policy's answers to the same queries with the same seeds; only what is not there yet is sampled.

    generation: what `ple_data.generate.generate` takes, but for the policy, `data`, `principles` and `round`.
    """
    asked = {name: value for name, value in generation.items() if name not in _NOT_ASKED}
    source = read_rows(generation["queries"], generation.get("split"))
    asked |= {"queries": source.digest, "sampling": asdict(generation["sampling"])}
    found = []
    for policy in policies:
        data = output / "answers" / json_digest([policy.name, asked])
        print(f"{policy.label}: answers of {policy.name} in {data}", file=sys.stderr, flush=True)
        generate(
            model=policy.model,
            revision=policy.revision,
            adapter=policy.adapter,
            data=data,
            principles=None,
            round=0,
            **generation,
        )
        found.append(Answers(policy, collect(_answers(Store(data), "answers")).to_dicts()))
    return found


def stored_answers(policies: Sequence[NamedPolicy], stores: Sequence[Path], round: int | None) -> list[Answers]:
    """The plain responses y of each policy in data directories, found by the policy's digests; nothing is sampled.

    Of a row that is there as response and as pair, one is taken. Raises UsageError where a policy has none.
    """
    frames = []
    for directory in stores:
        kinds = [_answers(Store(directory), kind, round) for kind in ("answers", "responses", "pairs")]
        frames.append(pl.concat(kinds).unique(["policy", "query_id", "round", "sample"], keep="first"))
    rows = collect(pl.concat(frames)).sort("round", "query_id", "sample")
    places = ", ".join(map(str, stores)) + ("" if round is None else f" (round {round})")
    found = []
    for policy in policies:
        own = rows.filter(pl.col("policy") == policy.name)
        if own.is_empty():
            there = ", ".join(rows["policy"].unique().sort().to_list()) or "nothing"
            raise UsageError(
                f"--policy {policy.label}: {places} holds no responses of {policy.name}; it holds those of {there}"
            )
        found.append(Answers(policy, own.to_dicts()))
    return found


def _answers(store: Store, kind: str, round: int | None = None) -> pl.LazyFrame:
    """The rows of `Answers` in one table of a store."""
    tokens = pl.col("y_ids").list.len().cast(pl.Int32).alias("tokens")
    return store.scan(kind, round=round).select(*_COLUMNS, tokens, pl.col("y_finish").alias("finish"))
