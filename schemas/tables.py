"""The Parquet tables that processes hand to one another: columns, versions, and reading with every check.

One row of `responses` or `pairs` is one (query, round, sample) with both arms: `y`, sampled given x, and
`y_prompt`, sampled given [p, x]. `pairs` adds the rewards. A row of `answers` has the plain arm alone: what
evaluation samples. These three make up a data directory (`STORED`). The other tables stand in files of their own:
`evaluation` and `cases` are the results of `ple eval` and `ple cases`, a row a response, `scores` is what they keep so
that nothing is computed twice, a row of `verdicts` is what a judge said of two responses to a query, and one of
`purity_logps` a pair under one policy. A file's key-value metadata holds, under `ple`, one JSON object with `kind`,
`version` and where the rows come from; in a data directory also `round` and `unit`.

A column that came after version 1 is nullable and carries the version it came with in its field metadata
(`since`); in older files it reads as null. From version 3 on a file has such a column only where it holds something
(`as_written`), so that a store that an older version began stays of one form. This room reads tables and never writes
one.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.errors import DamagedError, NewerError, first_line
from schemas.files import explained, refuse_no_file

METADATA_KEY = b"ple"


def _required(name: str, type_: pa.DataType) -> pa.Field:
    return pa.field(name, type_, nullable=False)


def _since(version: int, name: str, type_: pa.DataType) -> pa.Field:
    return pa.field(name, type_, nullable=True, metadata={b"since": str(version).encode()})


def since(field: pa.Field) -> int:
    """The version of the table in which a column first appeared."""
    return int((field.metadata or {}).get(b"since", b"1"))


ARMS = ("y", "y_prompt")
"""The two responses of a pair: to x, and to x under the principle."""
RESPONSES = pa.schema(
    [
        _required("query_id", pa.string()),
        _required("round", pa.int32()),
        _required("sample", pa.int32()),
        _required("x", pa.string()),
        _required("y", pa.string()),
        _required("y_prompt", pa.string()),
        _required("x_ids", pa.list_(pa.int32())),
        _required("y_ids", pa.list_(pa.int32())),
        _required("y_prompt_ids", pa.list_(pa.int32())),
        _required("y_finish", pa.string()),  # "stop" or "length"
        _required("y_prompt_finish", pa.string()),
        _required("y_empty", pa.bool_()),  # y.strip() == ""
        _required("y_prompt_empty", pa.bool_()),
        _required("principle", pa.string()),
        _required("policy", pa.string()),
        _required("seed", pa.int64()),
        pa.field("y_logps", pa.list_(pa.float32())),  # of the policy, one a sampled id, given x
        pa.field("y_prompt_logps", pa.list_(pa.float32())),  # given [p, x]
        _since(2, "reference", pa.string()),  # the answer that came with the query, if one did
        _since(3, "y_thought", pa.string()),  # with --strip-thoughts: what stood before the answer y; null: nothing
        _since(3, "y_prompt_thought", pa.string()),
        _since(3, "y_answered", pa.bool_()),  # with --strip-thoughts: false where the thought never ended
        _since(3, "y_prompt_answered", pa.bool_()),
    ]
)

PAIRS = pa.schema(
    [
        *RESPONSES,
        _required("s", pa.float32()),
        _required("s_prompt", pa.float32()),
        _required("reward_model", pa.string()),
        _since(3, "rewards", pa.list_(pa.float32())),  # of y by each model, where several scored it: in the order of
        _since(3, "rewards_prompt", pa.list_(pa.float32())),  # `reward_models` in the file's metadata; null of one
    ]
)
KEY = ["query_id", "round", "sample"]
REWARDS = pa.schema([PAIRS.field(name) for name in (*KEY, "s", "s_prompt", "reward_model")])
"""Of one model of several, before they are put together."""

_GUIDED = {field.name for field in RESPONSES if field.name.startswith("y_prompt")} | {"principle"}
ANSWERS = pa.schema(
    [
        field.remove_metadata() if field.name == "reference" else field  # which answers had from the first version on
        for field in RESPONSES
        if field.name not in _GUIDED
    ]
)

_ANSWER = [
    _required("label", pa.string()),  # the policy's name on the command line
    _required("policy", pa.string()),  # its name with digests, as in a store
    _required("query_id", pa.string()),
    _required("sample", pa.int32()),
    _required("x", pa.string()),
    _required("y", pa.string()),
    _required("tokens", pa.int32()),  # of y, the end-of-sequence token counted
    _required("finish", pa.string()),  # "stop" or "length"
    _required("rewards", pa.list_(pa.float64())),  # in the order of `reward_models` in the file's metadata
]
EVALUATION = pa.schema(
    [
        *_ANSWER,
        pa.field("reference", pa.string()),
        pa.field("reference_nll", pa.float64()),  # - log pi(reference|x) in nats, summed over its tokens
        pa.field("reference_tokens", pa.int32()),
        _since(2, "own_logps", pa.float64()),  # log pi(y|x) in nats of the policy itself, summed over y's tokens
        _since(2, "first_logps", pa.float64()),  # that of the evaluation's first policy, given the same x
    ]
)
CASES = pa.schema([*_ANSWER, pa.field("kind", pa.string())])  # kind of query, such as harmful
SCORES = pa.schema(
    [
        _required("key", pa.string()),  # digest of the texts or token ids that were scored
        _required("value", pa.float64()),  # a reward, or a sum of negative log-probabilities in nats
        pa.field("tokens", pa.int32()),  # that the sum is over; null for a reward
    ]
)

VERDICTS = pa.schema(
    [
        _required("query_id", pa.string()),
        pa.field("kind", pa.string()),  # of the query, where its source has that column
        pa.field("annotator", pa.string()),  # null: the verdict that counts (the judge's, or the annotators' majority)
        _required("verdict", pa.string()),  # "win" (A is better), "tie", "lose" or "unparsed"
        pa.field("a_first", pa.string()),  # a language model's choice with A shown first: "a", "b", "tie" or null
        pa.field("b_first", pa.string()),
        pa.field("a_first_answer", pa.string()),  # what it said, in full
        pa.field("b_first_answer", pa.string()),
        pa.field("reward_a", pa.float64()),
        pa.field("reward_b", pa.float64()),
        _required("x", pa.string()),
        _required("a", pa.string()),
        _required("b", pa.string()),
    ]
)
PURITY_LOGPS = pa.schema(
    [
        _required("policy", pa.string()),  # digest name, as in the stores
        _required("query_id", pa.string()),
        _required("round", pa.int32()),  # of the pair
        _required("sample", pa.int32()),
        _required("s", pa.float64()),
        _required("s_prompt", pa.float64()),
        _required("margin", pa.float64()),  # s_prompt - s
        pa.field("sum_logps_y", pa.float64()),  # log pi(y | x) in nats; null: no token, or over the model's positions
        pa.field("sum_logps_y_prompt", pa.float64()),  # log pi(y_prompt | x)
        pa.field("mean_logps_y", pa.float64()),  # the sum divided by the response's tokens
        pa.field("mean_logps_y_prompt", pa.float64()),
    ]
)

SCHEMAS: dict[str, pa.Schema] = {
    "responses": RESPONSES,
    "pairs": PAIRS,
    "rewards": REWARDS,
    "answers": ANSWERS,
    "evaluation": EVALUATION,
    "cases": CASES,
    "scores": SCORES,
    "verdicts": VERDICTS,
    "purity_logps": PURITY_LOGPS,
}
STORED = ("responses", "pairs", "answers")
"""The kinds that a data directory holds."""
VERSIONS = {kind: max(map(since, schema)) for kind, schema in SCHEMAS.items()}
"""The version of a table is that of its newest column."""
ALWAYS = 2
"""The version up to which every file has all columns."""
_NAMED = 5  # rows that a message names


def as_written(kind: str, table: pa.Table) -> tuple[pa.Table, int]:
    """The table as a file of `kind` holds it, and the file's version: that of the newest column which holds something,
    without those of later versions."""
    fields = list(SCHEMAS[kind])
    held = [since(field) for field in fields if since(field) <= ALWAYS or table[field.name].null_count < len(table)]
    kept = [field.name for field in fields if since(field) <= max(held)]
    return (table, VERSIONS[kind]) if len(kept) == len(fields) else (table.select(kept), max(held))


def metadata_bytes(kind: str, provenance: Mapping[str, Any], version: int | None = None) -> dict[bytes, bytes]:
    """The key-value metadata of a file of `kind`: kind and version beside the provenance (JSON values)."""
    record = {**provenance, "kind": kind, "version": version or VERSIONS[kind]}
    return {METADATA_KEY: json.dumps(record, sort_keys=True, ensure_ascii=False).encode()}


def check(kind: str, schema: pa.Schema, metadata: Mapping[bytes, bytes] | None, path: Path | str) -> dict[str, Any]:
    """The file's `ple` metadata, if the file is of `kind` in a version we know.

    Raises DamagedError that lists every mismatch at once.
    """
    try:
        record: dict[str, Any] = json.loads((metadata or {})[METADATA_KEY])
        found_kind, version = str(record["kind"]), int(record["version"])
    except (KeyError, ValueError, TypeError):
        record, found_kind, version = {}, kind, VERSIONS[kind]
        faults = ["it has no `ple` metadata: it was not written by this project, or was rewritten by another tool"]
    else:
        faults = []
    if found_kind != kind:
        raise DamagedError(f"{path}: holds a {found_kind} table, not a {kind} table: put it where it belongs")
    if version > VERSIONS[kind]:
        raise NewerError(
            f"{path}: not a readable {kind} table: it has {kind} version {version}, this program knows up to "
            f"{VERSIONS[kind]}: update the program"
        )
    faults += _column_faults(kind, schema, version)
    if faults:
        raise DamagedError(f"{path}: not a readable {kind} table: " + "; ".join(faults))
    return record


def _column_faults(kind: str, schema: pa.Schema, version: int) -> list[str]:
    if version == VERSIONS[kind] and schema.equals(SCHEMAS[kind]):
        return []  # at once: training opens every file of all rounds
    expected = {field.name: field for field in SCHEMAS[kind] if since(field) <= version}
    faults = []
    for name, field in expected.items():
        if name not in schema.names:
            faults.append(f"column `{name}` ({field.type}) is missing")
        elif not _same_type(schema.field(name).type, field.type):
            faults.append(f"column `{name}` is {schema.field(name).type} instead of {field.type}")
    doubled = sorted({name for name in schema.names if schema.names.count(name) > 1})
    faults += [f"column `{name}` stands there twice" for name in doubled]
    unknown = [name for name in dict.fromkeys(schema.names) if name not in expected]
    return faults + [f"column `{name}` is unknown" for name in unknown]


def _same_type(found: pa.DataType, expected: pa.DataType) -> bool:
    """Equal up to the names and nullability inside lists and the width of offsets, which readers choose freely."""
    if pa.types.is_list(expected):
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
        return is_list and _same_type(found.value_type, expected.value_type)
    if pa.types.is_string(expected):
        return bool(pa.types.is_string(found) or pa.types.is_large_string(found))
    return bool(found.equals(expected))


def read_table(path: Path | str, kind: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a file in the current version's columns (or those named), with page checksums verified.

    Columns younger than the file are null. Raises DamagedError: missing, cut short, altered, wrong or newer.
    """
    wanted = SCHEMAS[kind] if columns is None else pa.schema([SCHEMAS[kind].field(c) for c in columns])
    with _opened(path) as file:
        check(kind, file.schema_arrow, file.metadata.metadata, path)
        stored = [name for name in wanted.names if name in file.schema_arrow.names]
        return conform(file.read(columns=stored), wanted)


def read_metadata(path: Path | str, kind: str) -> dict[str, Any]:
    """The checked `ple` metadata of a file; reads its footer only. Raises DamagedError."""
    with _opened(path) as file:
        return check(kind, file.schema_arrow, file.metadata.metadata, path)


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table in the columns of `schema`, nullable ones that it lacks filled with null.

    Raises ValueError or pa.ArrowException: a required column is missing or holds nulls, or a value does not fit.
    """
    columns = []
    for field in schema:
        if field.name in table.column_names:
            columns.append(table.column(field.name))
        elif field.nullable:
            columns.append(pa.nulls(table.num_rows, field.type))
        else:
            raise ValueError(f"column `{field.name}` is missing")
    return pa.table(columns, names=schema.names).cast(schema)


def row_faults(kind: str, table: pa.Table, round: int) -> list[str]:
    """What is wrong with the rows of one file: another round, doubled keys, odd finish reasons or lengths, rewards.

    `table` has all the columns of `kind` in its current version. Each fault names the first rows (from 0) it is in.
    """
    faults = [("another round", pc.not_equal(table["round"], round))]
    for arm in [arm for arm in ARMS if arm in table.column_names]:
        known = pc.is_in(table[f"{arm}_finish"], pa.array(["stop", "length"]))
        faults.append((f"{arm}_finish is neither stop nor length", pc.invert(known)))
        differ = pc.not_equal(pc.list_value_length(table[f"{arm}_ids"]), pc.list_value_length(table[f"{arm}_logps"]))
        faults.append((f"{arm}_logps has not one value an id", pc.fill_null(differ, False)))
    for reward in ("s", "s_prompt"):
        if reward in table.column_names:
            faults.append((f"{reward} is not finite", pc.invert(pc.is_finite(table[reward]))))
    messages = [f"{what} in rows {_places(mask)}" for what, mask in faults if pc.any(mask).as_py()]
    doubled = table.group_by(KEY).aggregate([([], "count_all")]).filter(pc.field("count_all") > 1)
    for key in doubled.select(KEY).slice(0, _NAMED).to_pylist():
        messages.append("the key " + ", ".join(f"{k}={v!r}" for k, v in key.items()) + " stands there twice")
    return messages


def _places(mask: pa.ChunkedArray) -> str:
    rows = pc.indices_nonzero(mask).to_pylist()
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return ", ".join(map(str, rows[:_NAMED])) + more


RESTORE = "restore it from a copy, or run `ple verify` on its directory and follow what it says"


@contextmanager
def _opened(path: Path | str) -> Iterator[pq.ParquetFile]:
    """The Parquet file, open; whatever Arrow says of it becomes a DamagedError."""
    refuse_no_file(path, f"the file is missing: {RESTORE}")
    try:
        with explained(path, "read"), pa.OSFile(os.fsencode(path)) as source:
            yield pq.ParquetFile(source, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are no UTF-8, nulls
        raise DamagedError(f"{path}: not a whole Parquet file ({first_line(error)}): {RESTORE}") from error
