"""`ple export`: the pairs of a store in the forms that other tools read. Reads committed shards; never trains.

Rows are streamed shard by shard into JSON Lines or Parquet (by the file's suffix), which appears whole or not at all.
Other tools tokenise the text anew; training by the token ids that were sampled is what ple-train and ple baseline do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ple_data import selection
from ple_data.inputs.chat import Message, as_chat, as_text, to_messages
from ple_data.storage.store import Shard, Store
from schemas.errors import UsageError
from schemas.files import writing_atomic

STDOUT = "-"
EXPORTED = ["query_id", "round", "sample", "x", "y", "s", "y_prompt", "s_prompt"]
ANSWER_COLUMNS = ["sample", "x", "y", "policy"]

Rows = list[dict[str, Any]]


def export(data: Path, *, format: str, output: str, round: int | None = None) -> None:
    """Write the rows of `data` to `output` (a file, or `-` for stdout), of all rounds or of `round` alone.

    - trl-preference: prompt, chosen, rejected by reward (and score_chosen, score_rejected), for TRL's DPOTrainer. Pairs
      with equal rewards are left out, and counted on stderr.
    - sft: prompt and completion, the response with the highest reward of each query and round.
    - messages: the same as chat messages.
    - alpacaeval: a JSON array of instruction, output, generator: the plain responses of the newest round (or `round`),
      the first sample of each query.

    A chat that is stored in x becomes messages. Raises UsageError: no rows, an unknown suffix; DamagedError: a shard.
    """
    kind = _output_kind(format, output)
    store = Store(data)
    shards = _shards(store, format, round)
    converted = (FORMATS[format](_read(store, shard, format)) for shard in shards)
    read = sum(shard.rows for shard in shards)
    count = 0
    with _writer(kind, output) as writer:
        for rows in converted:
            writer.write(rows)
            count += len(rows)
        if not count:
            raise UsageError(f"{data}: no row to write, as {_why_nothing(format, read)}")
    _say(_summary(format, output, count, read, shards))


def _output_kind(format: str, output: str) -> str:
    """How the file is written: jsonl, json or parquet. Raises UsageError for a suffix that the format lacks."""
    known = {"alpacaeval": {".json": "json"}}.get(format, {".jsonl": "jsonl", ".parquet": "parquet"})
    if output == STDOUT:
        return next(iter(known.values()))
    if Path(output).suffix not in known:
        raise UsageError(f"--output {output}: {format} goes to a file that ends with {' or '.join(known)}, or to -")
    return known[Path(output).suffix]


def _shards(store: Store, format: str, round: int | None) -> list[Shard]:
    shards = _newest_plain(store, round) if format == "alpacaeval" else store.shards("pairs", round=round)
    if shards:
        return shards
    of_round = "" if round is None else f" of round {round}"
    if format == "alpacaeval":
        raise UsageError(f"{store.root} has no answers or pairs or responses{of_round}: sample some with ple-gen")
    raise UsageError(f"{store.root} has no pairs{of_round}: score its responses with ple-score")


def _newest_plain(store: Store, round: int | None) -> list[Shard]:
    """The shards of the newest round with plain responses: answers where there are some, else scored or not."""
    shards = store.shards("answers", round=round)
    if not shards:
        tables = [store.shards(table, round=round) for table in ("responses", "pairs")]
        shards = list({(shard.round, shard.unit): shard for table in tables for shard in table}.values())
    newest = max((shard.round for shard in shards), default=None)
    return sorted((shard for shard in shards if shard.round == newest), key=lambda shard: shard.unit)


def _why_nothing(format: str, read: int) -> str:
    if not read:
        return "its shards hold none"
    return "all pairs have equal rewards" if format == "trl-preference" else "there is no first sample of a query"


def _read(store: Store, shard: Shard, format: str) -> pl.DataFrame:
    columns = ANSWER_COLUMNS if format == "alpacaeval" else EXPORTED
    return pl.DataFrame(pl.from_arrow(store.read(shard, columns=columns)))


def _summary(format: str, output: str, count: int, read: int, shards: list[Shard]) -> str:
    rounds = len({shard.round for shard in shards})
    message = f"export: {count} rows to {'stdout' if output == STDOUT else output}, from {read} of {rounds} rounds"
    if format == "trl-preference":
        message += f"; {read - count} pairs with equal rewards left out"
    return message


# One shard → rows


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


def _sft(pairs: pl.DataFrame) -> Rows:
    best = selection.best_of_n(pairs).select("x", "y").iter_rows()
    return [{"prompt": _prompt(x), "completion": _answer(x, y)} for x, y in best]


def _messages(pairs: pl.DataFrame) -> Rows:
    best = selection.best_of_n(pairs).select("x", "y").iter_rows()
    return [{"messages": [*as_chat(x), _assistant(y.strip())]} for x, y in best]


def _alpacaeval(answers: pl.DataFrame) -> Rows:
    first = answers.filter(pl.col("sample") == 0).select("x", "y", "policy").iter_rows()
    return [{"instruction": _instruction(x), "output": y, "generator": policy} for x, y, policy in first]


FORMATS: dict[str, Callable[[pl.DataFrame], Rows]] = {
    "trl-preference": _trl_preference,
    "sft": _sft,
    "messages": _messages,
    "alpacaeval": _alpacaeval,
}


def _prompt(x: str) -> str | list[Message]:
    messages = to_messages(x)
    return messages if _is_chat(x, messages) else x


def _answer(x: str, y: str) -> str | list[Message]:
    return [_assistant(y)] if _is_chat(x, to_messages(x)) else y


def _instruction(x: str) -> str:
    """A query of one user turn as its text, any other as a dialogue."""
    messages = to_messages(x)
    return messages[0]["content"] if len(messages) == 1 else as_text(x)


def _is_chat(x: str, messages: list[Message]) -> bool:
    return messages != [{"role": "user", "content": x}]


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


# Rows → a file


class _Writer(Protocol):
    def write(self, rows: Rows) -> None: ...

    def close(self) -> None: ...


class _JsonLines:
    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def write(self, rows: Rows) -> None:
        self.file.writelines(_json(row) + b"\n" for row in rows)

    def close(self) -> None:
        """Nothing follows the last line."""


class _JsonArray:
    def __init__(self, file: BinaryIO) -> None:
        self.file, self.before = file, b"[\n"

    def write(self, rows: Rows) -> None:
        for row in rows:
            self.file.write(self.before + _json(row))
            self.before = b",\n"

    def close(self) -> None:
        self.file.write(b"\n]\n")


class _Parquet:
    """Row groups of one shard each; the first one says what the columns hold."""

    def __init__(self, file: BinaryIO, output: str) -> None:
        self.file, self.output = file, output
        self.writer: pq.ParquetWriter | None = None

    def write(self, rows: Rows) -> None:
        if not rows:
            return
        try:
            table = pa.Table.from_pylist(rows, schema=self.writer.schema if self.writer else None)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise UsageError(
                f"--output {self.output}: some queries are text and some are chats, which one Parquet column cannot "
                "hold; write to a .jsonl file"
            ) from error
        if self.writer is None:
            self.writer = pq.ParquetWriter(self.file, table.schema, compression="zstd")
        self.writer.write_table(table)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def _json(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


@contextmanager
def _writer(kind: str, output: str) -> Iterator[_Writer]:
    with nullcontext(sys.stdout.buffer) if output == STDOUT else writing_atomic(output) as file:
        writers: dict[str, Callable[[BinaryIO], _Writer]] = {
            "jsonl": _JsonLines,
            "json": _JsonArray,
            "parquet": partial(_Parquet, output=output),
        }
        with closing(writers[kind](file)) as writer:
            yield writer


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
