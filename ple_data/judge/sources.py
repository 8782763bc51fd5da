"""The two sides of a comparison: responses from a data directory or a file, joined by query id. Judges nothing."""

import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ple_data.inputs.chat import CHAT_START, as_chat, to_messages
from ple_data.inputs.readers import Rows, read_rows
from ple_data.storage.store import Store, asked_as_chat, collect
from schemas.errors import UsageError
from schemas.tables import ARMS

_NAMED = 5  # query ids that a message names


@dataclass(frozen=True)
class Response:
    """One side's response y to a query x; kind: a group that the source puts the query in; chat: x was asked as one."""

    query_id: str
    x: str
    y: str
    kind: str | None = None
    chat: bool = False


@dataclass(frozen=True)
class Pair:
    """Two responses, a and b, to one query; chat: it was asked as one."""

    query_id: str
    x: str
    a: str
    b: str
    kind: str | None = None
    chat: bool = False


@dataclass(frozen=True)
class Pairs:
    """The queries that both sides have, and how many only one has; a, b: the sources as they were named."""

    a: str
    b: str
    rows: list[Pair]
    only_a: int
    only_b: int

    def count(self) -> str:
        """How many queries there are and how many were left out, as a sentence."""
        left_out = f"left out: {self.only_a} only in A, {self.only_b} only in B"
        return f"{len(self.rows)} queries in both A and B; {left_out}"


def load_pairs(a: str, b: str) -> Pairs:
    """The responses of two sources to the same queries, in the order of A.

    A source is a Parquet, JSONL, JSON or CSV file with `query_id` (or `id`), `x` and `y`, or a data directory; there
    `#round=N` and `#arm=y_prompt` (or both: `data#round=4,arm=y_prompt`) choose. In the eval.parquet of `ple eval`
    `#label=NAME` chooses the policy. Raises UsageError: nothing in common, doubled ids, or an id that stands for two
    different queries.
    """
    left, right = ({response.query_id: response for response in load_responses(spec)} for spec in (a, b))
    common = [(one, right[id]) for id, one in left.items() if id in right]
    if not common:
        raise UsageError(f"{a} and {b} have no query in common: both must answer the same query ids")
    differ = [one.query_id for one, other in common if not same_query(one.x, other.x)]
    if differ:
        raise UsageError(
            f"{a} and {b} have different queries x under the same id, in {named(differ)}: "
            "compare responses to the same queries"
        )
    rows = [
        Pair(one.query_id, one.x, one.y, other.y, other.kind if one.kind is None else one.kind, one.chat or other.chat)
        for one, other in common
    ]
    return Pairs(a, b, rows, len(left) - len(common), len(right) - len(common))


def choose(pairs: Sequence[Pair], limit: int | None, seed: int) -> list[Pair]:
    """At most `limit` pairs, drawn by (seed, query id): a larger limit keeps those of a smaller one."""
    drawn = sorted(pairs, key=lambda pair: draw(seed, "choose", pair.query_id))[:limit]
    kept = {pair.query_id for pair in drawn}
    return [pair for pair in pairs if pair.query_id in kept]


def draw(seed: int, purpose: str, query_id: str) -> bytes:
    """32 random bytes that depend on nothing but the arguments."""
    return hashlib.sha256(f"{seed}/{purpose}/{query_id}".encode()).digest()


def load_responses(spec: str) -> list[Response]:
    """The responses that `spec` names, one a query. Raises UsageError."""
    path, choices = _parse(spec)
    if Path(path).is_dir():
        if "label" in choices:
            raise UsageError(f"{spec}: #label is for the eval.parquet of `ple eval`, and {path} is a directory")
        return _from_store(spec, Path(path), choices)
    if choices.keys() - {"label"}:
        raise UsageError(f"{spec}: #round and #arm are for a data directory, and {path} is none")
    rows = read_rows(path)
    return _from_file(_of_policy(rows, choices["label"]) if "label" in choices else rows)


def _parse(spec: str) -> tuple[str, dict[str, str]]:
    if Path(spec).exists():
        return spec, {}
    path, _, text = spec.partition("#")
    choices = dict(part.partition("=")[::2] for part in text.split(",")) if text else {}
    known = choices.keys() <= {"round", "arm", "label"}
    if not known or not choices.get("round", "0").isdigit() or choices.get("arm", "y") not in ARMS:
        raise UsageError(
            f"{spec}: after # expected round=N, arm=y or arm=y_prompt, with a comma between two, or label=NAME"
        )
    return path, choices


def _from_store(spec: str, root: Path, choices: dict[str, str]) -> list[Response]:
    import polars as pl

    arm = choices.get("arm", "y")
    store = Store(root)
    held = ["answers", "responses", "pairs"] if arm == "y" else ["responses", "pairs"]
    kind = next((kind for kind in held if store.shards(kind)), None)
    if kind is None:
        raise UsageError(f"{root}: no committed {' or '.join(held)}: give the data directory of a run, or a file")
    rows = store.scan(kind)
    rounds = sorted({shard.round for shard in store.shards(kind)})
    if "round" in choices:
        if int(choices["round"]) not in rounds:
            raise UsageError(f"{spec}: no {kind} of that round; there are rounds {', '.join(map(str, rounds))}")
        rows = rows.filter(pl.col("round") == int(choices["round"]))
    elif len(rounds) > 1:
        raise UsageError(f"{root} has {kind} of rounds {', '.join(map(str, rounds))}: choose one, {root}#round=N")
    found = collect(rows.select("query_id", "sample", "x", pl.col(arm).alias("y")).sort("query_id", "sample"))
    first = found.unique("query_id", keep="first", maintain_order=True)
    if first.height < found.height:
        print(f"{spec}: {found.height - first.height} further samples of the same queries left out", file=sys.stderr)
    chat = any(map(asked_as_chat, store.shards(kind, round=int(choices.get("round", rounds[0])))))
    return [Response(row["query_id"], row["x"], row["y"], chat=chat) for row in first.iter_rows(named=True)]


def _of_policy(rows: Rows, label: str) -> Rows:
    """The first sample of each query by one policy of an evaluation."""
    labels = sorted({str(row.get("label")) for row in rows.rows})
    kept = [n for n, row in enumerate(rows.rows) if str(row.get("label")) == label and not row.get("sample")]
    if not kept:
        raise UsageError(f"{rows.source} has no row with the label {label}; there are {', '.join(labels)}")
    return replace(rows, rows=[rows.rows[n] for n in kept], places=[rows.places[n] for n in kept])


def _from_file(rows: Rows) -> list[Response]:
    ids = [str(id) for id in _values(rows, "query_id", "id", of=(str, int))]
    doubled = [id for id, count in Counter(ids).items() if count > 1]
    if doubled:
        hint = " (or choose a policy: FILE#label=NAME)" if "label" in rows.columns else ""
        raise UsageError(f"{rows.source} has two rows for {named(doubled)}: keep one response a query{hint}")
    kinds = [None if row.get("kind") is None else str(row["kind"]) for row in rows.rows]
    xs, ys = (_values(rows, *names, of=(str,)) for names in (("x", "prompt"), ("y", "response")))
    for place, x in zip(rows.places, xs, strict=True):
        if x.startswith(CHAT_START) and to_messages(x) == [{"role": "user", "content": x}]:
            raise UsageError(
                f"{rows.source} {place}: x begins like a stored chat but is no list of turns with role and content as "
                f"text ({x!r:.80}): correct the row"
            )
    return [Response(*row) for row in zip(ids, xs, ys, kinds, strict=True)]


def _values(rows: Rows, *names: str, of: tuple[type, ...]) -> list[Any]:
    """The first of the columns `names` that there is. Raises UsageError with the first row that has no such value."""
    name = next((name for name in names if name in rows.columns), None)
    if name is None:
        raise UsageError(f"{rows.source} has no column {' or '.join(names)}; it has {', '.join(rows.columns)}")
    for place, row in zip(rows.places, rows.rows, strict=True):
        if not isinstance(row.get(name), of) or isinstance(row.get(name), bool):
            raise UsageError(f"{rows.source} {place}: {name} is {row.get(name)!r:.80}: give every row one as text")
    return [row[name] for row in rows.rows]


def same_query(x: str, other: str) -> bool:
    """Whether two forms of a query (plain text, dialogue, stored chat) say the same."""
    return x == other or as_chat(x) == as_chat(other)


def named(query_ids: list[str]) -> str:
    """The first of some query ids, for a message."""
    more = f" and {len(query_ids) - _NAMED} more" if len(query_ids) > _NAMED else ""
    return "query " + ", ".join(map(repr, query_ids[:_NAMED])) + more
