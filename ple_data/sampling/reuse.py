"""Rows of earlier stores that a round may take instead of sampling them again. Writes nothing.

A row matches when its policy (by digest), query id, rendered query, principle, sampling settings and sample number are
those that the round asks for. Seed, round, engine and number type may differ: the distribution is the same.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ple_data.common.digests import digests_of, ids_digest
from ple_data.common.settings import counted
from ple_data.inputs.chat import to_text
from ple_data.sampling.plan import Plan, Prompt
from ple_data.sampling.terms import IN_OLDER
from ple_data.storage.store import Shard, Store
from schemas.errors import UsageError
from schemas.options import Sampling

_Key = tuple[str, int, str]
_TABLES_IN_MEMORY = 8


class Reuse:
    """Finds rows that fit a plan in earlier data directories."""

    def __init__(self, directories: Sequence[Path], plan: Plan, data: Path) -> None:
        """Index the matching rows of `directories`. Raises UsageError for one without responses, or `data` itself."""
        assert plan.principle is not None  # rows are pairs of responses
        self._principle = plan.principle.text
        self._plan = plan
        self._places: dict[_Key, tuple[Store, Shard, int]] = {}
        self._missed: Counter[str] = Counter()
        self._table = lru_cache(maxsize=_TABLES_IN_MEMORY)(Store.read)
        for directory in directories:
            store = Store(directory)
            if directory.resolve() == data.resolve():
                raise UsageError(f"--reuse {directory} is --data itself; its committed rows are never sampled again")
            shards = store.shards("responses")
            if not shards:
                raise UsageError(f"--reuse {directory} has no committed responses")
            for shard in shards:
                self._index(store, shard)

    def row(self, prompt: Prompt, sample: int) -> dict[str, Any] | None:
        """The row for a prompt and sample, with this plan's round and name of the policy; None if there is none."""
        place = self._places.get((prompt.query.id, sample, ids_digest(prompt.x_ids)))
        if place is None:
            return None
        store, shard, at = place
        row = self._table(store, shard).slice(at, 1).to_pylist()[0]
        row |= {"round": self._plan.round, "policy": self._plan.policy}
        row |= {"x": to_text(prompt.query.x), "reference": prompt.query.reference}
        if not self._plan.sampling.logprobs:
            row |= {"y_logps": None, "y_prompt_logps": None}
        return row

    def _index(self, store: Store, shard: Shard) -> None:
        if differ := self._other_sampling(store.provenance(shard)):
            self._missed.update(differ)
            return
        table = store.read(shard, ["query_id", "sample", "policy", "principle", "x_ids"])
        for at, row in enumerate(table.to_pylist()):
            if digests_of(row["policy"]) != digests_of(self._plan.policy):
                self._missed[f"policy: {row['policy']} there, {self._plan.policy} here"] += 1
            elif row["principle"] != self._principle:
                self._missed["principle: another text there"] += 1
            else:
                key = (row["query_id"], row["sample"], ids_digest(row["x_ids"]))
                self._places.setdefault(key, (store, shard, at))

    def _other_sampling(self, found: Mapping[str, Any]) -> list[str]:
        """Settings of the sampling that differ from the plan's; what is younger counts as its default."""
        wanted = counted(self._plan.sampling)
        there = counted(Sampling()) | (found.get("sampling") or {})
        if there["logprobs"]:
            there["logprobs"] = wanted["logprobs"]  # they need not be kept
        for name, older in IN_OLDER.items():
            there[name], wanted[name] = found.get(name, older), self._plan.settings.get(name, older)
        names = sorted(name for name in there if there[name] != wanted.get(name))
        return [f"{name}: {there[name]!r} there, {wanted.get(name)!r} here" for name in names]

    def why_none(self) -> str | None:
        """Why no row fits the plan; None where one does, or may."""
        if not self._plan.taken.complete:
            return None  # not before all queries are looked at
        ids = set()
        for prompt, sample in (row for unit in self._plan.units for row in self._plan.rows(unit)):
            if (prompt.query.id, sample, ids_digest(prompt.x_ids)) in self._places:
                return None
            ids.add(prompt.query.id)
        reasons = [reason for reason, _ in self._missed.most_common(3)]
        if ids & {id for id, *_ in self._places}:
            reasons.append("the same queries became other tokens (chat template, --prompt-format) or are other samples")
        elif self._places:
            reasons.append("the query ids are others")
        return f"--reuse: no row there fits this round: {'; '.join(reasons)}"
