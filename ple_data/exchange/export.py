"""`ple export`: the pairs of a store in the forms that other tools read. Reads committed shards; never trains.

Rows are streamed shard by shard into JSON Lines or Parquet (by the file's suffix), which appears whole or not at all.
Other tools tokenise the text anew; training by the token ids that were sampled is what ple-train and ple baseline do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ple_data import selection
from ple_data.inputs.chat import Message, as_chat, as_text, stored_chat, to_messages
from ple_data.storage.store import Shard, Store, open_store
from schemas.errors import UsageError
from schemas.files import writing_atomic
from schemas.tables import ARMS

STDOUT = "-"
EXPORTED = ["query_id", "round", "sample", "x", "y", "s", "y_prompt", "s_prompt", "policy", "reward_model"]
EXPORTED += [f"{arm}_answered" for arm in ARMS]
WITHOUT_TIES = {"trl-preference": 1, "trl-kto": 2}
"""Formats that leave out pairs with equal rewards, and how many rows they make of any other."""
MAY_BE_NULL = {
    "preference": pa.string(),
    "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
}
"""What a Parquet file's columns hold that may be null in all of its first rows."""
OF_BEST = {"sft", "messages"}
"""Formats with one row a query and round, its best response."""
ANSWER_COLUMNS = ["sample", "x", "y", "policy"]

Rows = list[dict[str, Any]]


def export(data: Path, *, format: str, output: str, round: int | None = None) -> None:
    """Write the rows of `data` to `output` (a file, or `-` for stdout), of all rounds or of `round` alone.

    - trl-preference: prompt, chosen, rejected by reward (and score_chosen, score_rejected), for TRL's DPOTrainer. Pairs
      with equal rewards are left out, and counted on stderr.
    - trl-kto: prompt, completion, label: the same pairs as two rows each, for TRL's KTOTrainer.
    - distilabel: instruction (and messages, of a chat), generations, ratings, generation_models: a row a pair.
    - argilla: a record a pair: id, instruction, response_1 and response_2 (y and y_prompt), preference (the one with
      the higher reward), and their rewards, round and policy as metadata.
    - sft: prompt and completion, the response with the highest reward of each query and round.
    - messages: the same as chat messages.
    - alpacaeval: a JSON array of instruction, output, generator: the plain responses of the newest round (or `round`),
      the first sample of each query.

    Pairs in which a thought never ended are left out, and counted; of sft and messages such responses. alpacaeval has
    their empty answers: it asks for every query. A chat that is stored in x becomes messages. Raises UsageError: no
    rows, an unknown suffix; DamagedError: a shard.
    """
    write = _writer(format, output)
    store = open_store(data)
    shards = _shards(store, format, round)
    by_pair = WITHOUT_TIES.get(format)
    columns = ANSWER_COLUMNS if format == "alpacaeval" else EXPORTED
    read, count, unanswered = sum(shard.rows for shard in shards), 0, 0

    def tables() -> Iterator[pl.DataFrame]:
        nonlocal unanswered
        chosen = []
        for shard in shards:
            rows = pl.DataFrame(pl.from_arrow(store.read(shard, columns)))
            if format in OF_BEST:  # the rows of a query may stand in several shards
                unanswered += sum(len(rows) - len(selection.answered(rows, arm)) for arm in ARMS)
                chosen.append(selection.best_of_n(rows))
                continue
            kept = rows if format == "alpacaeval" else selection.answered(rows, *ARMS)
            unanswered += len(rows) - len(kept)
            yield kept
        if chosen:
            yield selection.best(pl.concat(chosen, how="vertical_relaxed"))

    def converted() -> Iterator[Rows]:
        nonlocal count
        for table in tables():
            rows = FORMATS[format](table)
            count += len(rows)
            yield rows
        if not count:
            left_out = "all pairs have equal rewards" if by_pair else "there is no first sample of a query"
            if unanswered:
                left_out = f"{left_out} or a thought that never ended" if by_pair else "no thought ever ended"
            raise UsageError(f"{data}: no row to write, as {left_out if read else 'its shards hold none'}")

    try:
        with nullcontext(sys.stdout.buffer) if output == STDOUT else writing_atomic(output) as file:
            write(file, converted())
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UsageError(
            f"--output {output}: some queries are text and some are chats, which one Parquet column cannot hold; "
            "write to a .jsonl file"
        ) from error
    left_out = f"; {read - unanswered - count // by_pair} pairs with equal rewards left out" if by_pair else ""
    if unanswered:
        what = "responses whose thought" if format in OF_BEST else "pairs in which a thought"
        left_out += f"; {unanswered} {what} never ended left out"
    where, rounds = "stdout" if output == STDOUT else output, len({shard.round for shard in shards})
    of = f"{read} pairs of {rounds} round{'s' if rounds > 1 else ''}"
    print(f"export: {count} rows to {where}, from {of}{left_out}", file=sys.stderr, flush=True)


def _writer(format: str, output: str) -> Callable[[BinaryIO, Iterable[Rows]], None]:
    """What writes such a file. Raises UsageError for a suffix that the format lacks."""
    known = {".json": _write_json} if format == "alpacaeval" else {".jsonl": _write_jsonl, ".parquet": _write_parquet}
    suffix = next(iter(known)) if output == STDOUT else Path(output).suffix
    if suffix not in known:
        raise UsageError(f"--output {output}: {format} goes to a file that ends with {' or '.join(known)}, or to -")
    return known[suffix]


def _shards(store: Store, format: str, round: int | None) -> list[Shard]:
    of_round = "" if round is None else f" of round {round}"
    if format != "alpacaeval":
        shards, missing = store.shards("pairs", round=round), f"pairs{of_round}: score its responses with ple-score"
    else:
        shards = _newest_plain(store, round)
        missing = f"answers or pairs or responses{of_round}: sample some with ple-gen"
    if not shards:
        raise UsageError(f"{store.root} has no {missing}")
    return shards


def _newest_plain(store: Store, round: int | None) -> list[Shard]:
    """The shards of the newest round with plain responses: answers where there are some, else scored or not."""
    shards = store.shards("answers", round=round)
    if not shards:
        tables = [store.shards(table, round=round) for table in ("responses", "pairs")]
        shards = list({(shard.round, shard.unit): shard for table in tables for shard in table}.values())
    newest = max((shard.round for shard in shards), default=None)
    return sorted((shard for shard in shards if shard.round == newest), key=lambda shard: shard.unit)


# Rows of the store → rows of the file


def _trl_preference(pairs: pl.DataFrame) -> Rows:
    return [
        {
            "prompt": _prompt(row["x"]),
            "chosen": _answer(row["x"], row["chosen"]),
            "rejected": _answer(row["x"], row["rejected"]),
            "score_chosen": row["chosen_reward"],
            "score_rejected": row["rejected_reward"],
        }
        for row in selection.preferences(pairs).iter_rows(named=True)
    ]


def _trl_kto(pairs: pl.DataFrame) -> Rows:
    return [
        {"prompt": _prompt(row["x"]), "completion": _answer(row["x"], row[side]), "label": side == "chosen"}
        for row in selection.preferences(pairs).iter_rows(named=True)
        for side in ("chosen", "rejected")
    ]


def _distilabel(pairs: pl.DataFrame) -> Rows:
    return [
        {
            "instruction": _instruction(row["x"]),
            "messages": stored_chat(row["x"]),
            "generations": [row["y"], row["y_prompt"]],
            "ratings": [row["s"], row["s_prompt"]],
            "generation_models": [row["policy"]] * 2,
        }
        for row in pairs.iter_rows(named=True)
    ]


def _argilla(pairs: pl.DataFrame) -> Rows:
    return [
        {
            "id": "{round}/{query_id}/{sample}".format(**row),
            "instruction": _instruction(row["x"]),
            "response_1": row["y"],
            "response_2": row["y_prompt"],
            "preference": None if row["s"] == row["s_prompt"] else f"response_{1 + (row['s_prompt'] > row['s'])}",
            "reward_1": row["s"],
            "reward_2": row["s_prompt"],
            "round": row["round"],
            "policy": row["policy"],
        }
        for row in pairs.iter_rows(named=True)
    ]


def _sft(best: pl.DataFrame) -> Rows:
    return [{"prompt": _prompt(x), "completion": _answer(x, y)} for x, y in best.select("x", "y").iter_rows()]


def _messages(best: pl.DataFrame) -> Rows:
    rows = best.select("x", "y").iter_rows()
    return [{"messages": [*as_chat(x), _assistant(y.strip())]} for x, y in rows]


def _alpacaeval(answers: pl.DataFrame) -> Rows:
    first = answers.filter(pl.col("sample") == 0).select("x", "y", "policy").iter_rows()
    return [{"instruction": _instruction(x), "output": y, "generator": policy} for x, y, policy in first]


FORMATS: dict[str, Callable[[pl.DataFrame], Rows]] = {
    "trl-preference": _trl_preference,
    "trl-kto": _trl_kto,
    "distilabel": _distilabel,
    "argilla": _argilla,
    "sft": _sft,
    "messages": _messages,
    "alpacaeval": _alpacaeval,
}


def _prompt(x: str) -> str | list[Message]:
    return stored_chat(x) or x


def _answer(x: str, y: str) -> str | list[Message]:
    return [_assistant(y)] if stored_chat(x) else y


def _instruction(x: str) -> str:
    """A query of one user turn as its text, any other as a dialogue."""
    messages = to_messages(x)
    return messages[0]["content"] if len(messages) == 1 else as_text(x)


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


# Rows of each shard → a file


def _write_jsonl(file: BinaryIO, parts: Iterable[Rows]) -> None:
    file.writelines(_json(row) + b"\n" for row in chain.from_iterable(parts))


def _write_json(file: BinaryIO, parts: Iterable[Rows]) -> None:
    before = b"[\n"
    for row in chain.from_iterable(parts):
        file.write(before + _json(row))
        before = b",\n"
    file.write(b"\n]\n")


def _write_parquet(file: BinaryIO, parts: Iterable[Rows]) -> None:
    """Row groups of one shard each; the first one says what the columns hold."""
    with ExitStack() as stack:
        writer = None
        for rows in filter(None, parts):
            table = pa.Table.from_pylist(rows, schema=writer.schema if writer else _schema(rows))
            if writer is None:
                writer = stack.enter_context(pq.ParquetWriter(file, table.schema, compression="zstd"))
            writer.write_table(table)


def _schema(rows: Rows) -> pa.Schema:
    return pa.schema([f.with_type(MAY_BE_NULL.get(f.name, f.type)) for f in pa.Table.from_pylist(rows).schema])


def _json(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()
