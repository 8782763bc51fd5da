"""Rows of earlier stores that a round may take instead of sampling them again. Writes nothing.

A row matches when its policy (by digest), query id, rendered query, principle, sampling settings and sample number are
those that the round asks for. Seed, round, engine and number type may differ: the distribution is the same.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ple_data.common.digests import digests_of, ids_digest
from ple_data.common.settings import counted
from ple_data.sampling.plan import Plan, Prompt
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
        if not self._plan.sampling.logprobs:
            row |= {"y_logps": None, "y_prompt_logps": None}
        return row

    def _index(self, store: Store, shard: Shard) -> None:
        if not self._same_sampling(store.provenance(shard).get("sampling")):
            return
        table = store.read(shard, ["query_id", "sample", "policy", "principle", "x_ids"])
        for at, row in enumerate(table.to_pylist()):
            same_policy = digests_of(row["policy"]) == digests_of(self._plan.policy)
            if same_policy and row["principle"] == self._principle:
                key = (row["query_id"], row["sample"], ids_digest(row["x_ids"]))
                self._places.setdefault(key, (store, shard, at))

    def _same_sampling(self, found: Any) -> bool:
        wanted = counted(self._plan.sampling)
        if not isinstance(found, dict) or (wanted["logprobs"] and not found.get("logprobs")):
            return False
        return counted(Sampling()) | found | {"logprobs": wanted["logprobs"]} == wanted  # of what is younger, defaults
