"""Plain answers of several policies to the same queries: sampled and kept, or taken from a store. Measures nothing.

Each policy's answers lie in a store of their own, OUTPUT/answers/DIGEST, whose name says what they were asked:
the same question is never sampled twice, and another one never meets them.
"""

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ple_data.common.digests import digests_of, json_digest
from ple_data.common.models import load_tokenizer
from ple_data.common.settings import as_json, counted
from ple_data.engines import parse_engine_args
from ple_data.evaluation.policies import NamedPolicy
from ple_data.inputs.queries import load_queries
from ple_data.inputs.templates import uses_chat
from ple_data.sampling.generate import generate
from ple_data.storage.store import Shard, Store, asked_as_chat, collect, scan_shards
from schemas.errors import UsageError
from schemas.files import refuse_outside
from schemas.options import Asked, Gen
from schemas.tables import read_metadata

_COLUMNS = ["query_id", "round", "sample", "x", "y", "x_ids", "y_ids", "reference", "policy"]
KEPT_APART = (
    *("samples", "seed", "shuffle", "skip", "limit", "unit_size", "dtype", "prompt_format", "max_query_tokens"),
    *("reader", "query_column", "prefix_words", "split", "max_new_tokens", "temperature", "top_p", "stop", "logprobs"),
)
"""Options whose value is in the name of every folder of answers."""
AS_IS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""How a policy is sampled as it is."""
_ONLY_FASTER = {
    *("batch_size", "device", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "enforce_eager"),
    *("kv_cache_memory_bytes", "swap_space", "cpu_offload_gb", "max_model_len"),
    *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"),
}
"""Engine arguments that say how much runs at once and where, not what is sampled: answers survive a change of them."""


@dataclass(frozen=True)
class Answers:
    """One policy's answers. A row is a dict of query_id, sample, x, x_ids, y, y_ids (an array), tokens, finish,
    reference, and label and policy (its name); what is measured of an answer is put there too. chat: the queries were
    asked as chats. as_is: all were drawn from the policy itself, at temperature 1 and with nothing else (`AS_IS`).
    """

    policy: NamedPolicy
    rows: list[dict[str, Any]]
    chat: bool
    as_is: bool

    def by_query(self) -> dict[str, list[dict[str, Any]]]:
        """The rows of each query, queries and rows in the order in which they were asked."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            found.setdefault(row["query_id"], []).append(row)
        return found


def sample_answers(policies: Sequence[NamedPolicy], output: Path, source: str, asked: Asked) -> list[Answers]:
    """Each policy's answers to the same queries with the same seeds; only what is not there yet is sampled.

    source: file or hub id of the queries. References are those that stand beside the queries now.
    """
    found = []
    for policy in policies:
        chat = uses_chat(load_tokenizer(policy.model, policy.revision, note=lambda _: None), asked.prompt_format)
        queries = load_queries(source, asked, chat=chat)
        key = json_digest([digests_of(policy.name), _told_apart(asked) | {"queries": queries.asked_digest}])
        data = output / "answers" / key
        refuse_outside(output, data)
        print(f"{policy.label}: answers of {policy.name} in {data}", file=sys.stderr, flush=True)
        start: dict[str, Any] = {"model": policy.model, "revision": policy.revision, "adapter": policy.adapter}
        generate(Gen(**start, **asked.part(Asked).values(), queries=source, data=data, principles=None, round=0))
        references = {query.id: query.reference for query in queries.queries}
        rows = _rows(collect(_answers(Store(data), "answers")), policy)
        rows = [row | {"reference": references[row["query_id"]]} for row in rows]
        found.append(Answers(policy, rows, chat, _drawn_as_is(asked.values())))
    return found


def _told_apart(asked: Asked) -> dict[str, Any]:
    arguments = parse_engine_args(asked.engine_arg)
    engine_args = {name: value for name, value in arguments.items() if name not in _ONLY_FASTER}
    counts = counted(asked.part(Asked), always=KEPT_APART)
    return {name: counts[name] for name in counts.keys() - {"engine", "engine_arg"}} | {"engine_args": engine_args}


def asked_settings(asked: Asked, source: str) -> dict[str, Any]:
    """What sampling was asked, as JSON values, for a report."""
    values = {name: as_json(value) for name, value in asked.part(Asked).values().items()}
    return values | {"engine_args": parse_engine_args(values.pop("engine_arg")), "queries": source}


def stored_answers(policies: Sequence[NamedPolicy], stores: Sequence[Path], round: int | None) -> list[Answers]:
    """The plain responses y of each policy in data directories, found by the policy's digests; nothing is sampled.

    A row that is there several times (as response and as pair, in two stores) counts once. Raises UsageError where a
    policy has none.
    """
    kinds = ("answers", "responses", "pairs")
    frames = [_answers(Store(directory), kind, round) for directory in stores for kind in kinds]
    key = ["round", "query_id", "sample", "y", "tokens", "policy"]
    rows = collect(pl.concat(frames)).unique(key, keep="first", maintain_order=True).sort(key)
    held = rows["policy"].unique().sort().to_list()
    places = ", ".join(map(str, stores)) + ("" if round is None else f" (round {round})")
    found = []
    for policy in policies:
        own = rows.filter(
            pl.col("policy").is_in([name for name in held if digests_of(name) == digests_of(policy.name)])
        )
        if own.is_empty():
            there = ", ".join(held) or "nothing"
            raise UsageError(
                f"--policy {policy.label}: {places} holds no responses of {policy.name}; it holds those of {there}"
            )
        found.append(Answers(policy, _rows(own, policy), own["chat"].any(), own["as_is"].all()))
    return found


def _rows(frame: pl.DataFrame, policy: NamedPolicy) -> list[dict[str, Any]]:
    """The rows of `Answers`; as lists, the ids of long responses would take ten times the memory."""
    told = {"label": policy.label, "policy": policy.name}
    rows = frame.drop("y_ids", "chat", "as_is").to_dicts()
    return [row | told | {"y_ids": ids.to_numpy()} for row, ids in zip(rows, frame["y_ids"], strict=True)]


def _answers(store: Store, kind: str, round: int | None = None) -> pl.LazyFrame:
    """The rows of `Answers` in one table of a store, with `chat` and `as_is` of each."""
    shards = [
        (shard, (asked_as_chat(shard), _drawn_as_is(_sampling_of(shard)))) for shard in store.shards(kind, round=round)
    ]
    parts = []
    for how in itertools.product((False, True), repeat=2):
        rows = scan_shards(kind, [shard for shard, own in shards if own == how])
        parts.append(rows.with_columns(chat=pl.lit(how[0]), as_is=pl.lit(how[1])))
    rows = pl.concat(parts)
    tokens = pl.col("y_ids").list.len().cast(pl.Int32).alias("tokens")
    return rows.select(*_COLUMNS, tokens, pl.col("y_finish").alias("finish"), "chat", "as_is")


def _sampling_of(shard: Shard) -> dict[str, Any]:
    """How the responses of a shard were drawn, as its writer noted, over what older ones did not know."""
    noted = read_metadata(shard.path, shard.kind).get("sampling")
    return {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0} | (noted if isinstance(noted, dict) else {})


def _drawn_as_is(sampling: Mapping[str, Any]) -> bool:
    return all(sampling.get(name) == value for name, value in AS_IS.items())
