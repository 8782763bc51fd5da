"""`ple baseline sft | context-distillation | raft`: methods that PLE is compared with, on the rows of the same store.

Each takes the place of ple-train in a run: pairs up to round T in, the next policy's LoRA adapter out. All three are
Eq. 1 on chosen responses (`ple_data.selection` chooses), by the token ids that were sampled. Never samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from ple_data import selection
from ple_data.common.tokens import ids_after
from ple_data.inputs.templates import response_form
from ple_data.storage.store import asked_as_chat, scan_shards
from ple_train import snapshot as snapshots
from ple_train.engine.session import Session
from ple_train.engine.tabular import file_digest
from ple_train.log import print_to_log
from ple_train.model.batches import Sequence
from ple_train.objectives import make_objective
from ple_train.sft import read_sequences, sequence_stream
from ple_train.stream import Limits, checked_ids
from ple_train.train import note_principle
from schemas.errors import UsageError
from schemas.options import Baseline, BaselineSft, PromptFormat

CHOOSERS = {"context-distillation": selection.guided, "raft": selection.best_of_n}
SAMPLED_FOR = {"context-distillation": ("y_prompt_ids",), "raft": ("y_ids", "y_prompt_ids"), "sft": ()}
"""The ids whose sampling a method needs, whether it trains on them or not."""
CHOSEN_FROM = ["query_id", "round", "sample", "s", "s_prompt", "x_ids", "y_ids", "y_prompt_ids"]
REFERENCE_COLUMNS = ["query_id", "round", "x_ids", "reference"]
_TOKENIZED_AT_ONCE = 1024


def baseline(method: str, options: Baseline) -> None:
    """Train `model` (from `adapter` on, where given) by Eq. 1 on the responses that `method` chooses; write `output`.

    method: `context-distillation` (y_prompt given x) and `sft` (the queries' references) take all rounds ≤ `round`, as
    ple-train does; `raft` (the best response of each query) takes `round` alone, as RAFT trains on the samples of the
    current policy. `sft` takes BaselineSft: also files of (x, y) rows instead of stores, and then needs no `round`.
    Raises UsageError, DamagedError (a shard), LockedError (another process writes `output`), PleError (NaN).
    """
    snapshots.refuse_doubled_stores(options.data)
    files = _files(options.data) if isinstance(options, BaselineSft) else []
    if not files:
        _refuse_for_stores(options)
    first = options.round if method == "raft" else 0
    more = {"method": method, "data_digests": [file_digest(path) for path in files]}
    with Session("baseline", options, more=more, elsewhere=() if files else ["data"]) as session:
        if session.finished:
            if not files:
                snapshots.check_finished(session, options.data, options.round, first)
            return
        tokenizer, policy = session.load_tokenizer(), session.load_policy()
        sampled: dict[int, int] = {}
        if files and isinstance(options, BaselineSft):
            how = options.max_length, options.prompt_format
            sequences = [s for path in files for s in read_sequences(path, tokenizer, *how)]
        else:
            longest_pair = None if method == "sft" else options.max_length  # a reference's pair is not trained on
            snapshot = snapshots.frozen_snapshot(session, options.data, options.round, longest_pair, first)
            sequences = choose(method, snapshot, options.max_length, tokenizer, policy)
            sampled = snapshots.sampled_by_round(snapshot, SAMPLED_FOR[method])
            if method == "raft":
                note_principle(scan_shards("pairs", [part.shard for part in snapshot]))
        stream = sequence_stream(sequences, policy, options)
        history = session.fit(policy, stream, make_objective("sft", policy))
        what = method if options.round is None else f"{method}, round {options.round}"
        session.finish(policy.model, history, what, sampled=sampled)


def _refuse_for_stores(options: Baseline) -> None:
    if options.round is None:
        raise UsageError("--round is missing: it says up to which round the pairs of --data are taken")
    if isinstance(options, BaselineSft) and options.prompt_format != "auto":
        raise UsageError(
            "--prompt-format goes with files of (x, y) rows; the pairs of a folder have their prompts: leave it out"
        )


def _files(data: tuple[Path, ...]) -> list[Path]:
    """The files among `data`: all or none. Raises UsageError where one is missing, and for files beside folders."""
    for path in data:
        if not path.exists():
            raise UsageError(f"--data {path}: no such file or folder; correct the path")
    files = [path for path in data if path.is_file()]
    if files and len(files) < len(data):
        raise UsageError("--data holds files and stores; give files of (x, y) rows or stores, not both")
    return files


def choose(
    method: str, snapshot: list[snapshots.SnapshotShard], max_length: int | None, tokenizer: Any, limits: Limits
) -> list[Sequence]:
    """The responses that a method learns from, as sequences. Raises UsageError where there is none."""
    if method == "sft":
        rows = with_reference_ids(snapshot, tokenizer)
    else:
        frames = [CHOOSERS[method](snapshots.read_rows(part, CHOSEN_FROM, max_length)) for part in snapshot]
        rows = selection.best(pl.concat(frames)) if method == "raft" else pl.concat(frames)
    sequences = []
    for row in rows.select("query_id", "round", "x_ids", "ids").iter_rows(named=True):
        sequence = Sequence(checked_ids(row, "ids", "response", limits), len(row["x_ids"]))
        if sequence.response > 0 and (max_length is None or len(sequence.ids) <= max_length):
            sequences.append(sequence)
    if not sequences:
        hint = ": its queries came without references (see ple-gen --queries)" if method == "sft" else ""
        raise UsageError(f"{method}: no response to train on in --data{hint}")
    counts = sorted(set(rows["n"])) if "n" in rows.columns else []
    best_of = f", each the best of {' or '.join(map(str, counts))}" if counts else ""
    print_to_log(f"{method}: {len(sequences)} responses{best_of}")
    if left_out := rows.height - len(sequences):
        too_long = "" if max_length is None else f", or longer than --max-length {max_length}"
        print_to_log(f"{left_out} responses left out: empty{too_long}")
    return sequences


def with_reference_ids(snapshot: list[snapshots.SnapshotShard], tokenizer: Any) -> pl.DataFrame:
    """The first row of each query that came with a reference; `ids`: the reference as it ends after what was asked."""
    frames = []
    for part in snapshot:
        found = selection.references(snapshots.read_rows(part, REFERENCE_COLUMNS, None))
        frames.append(found.with_columns(chat=asked_as_chat(part.shard)))
    rows = selection.first_of_each_query(pl.concat(frames))
    parts = []
    for chat in (False, True):
        own = rows.filter(pl.col("chat") == chat)
        parts.append(own.with_columns(reference_ids(own, tokenizer, "auto" if chat else "plain").alias("ids")))
    return pl.concat(parts)


def reference_ids(rows: pl.DataFrame, tokenizer: Any, prompt_format: PromptFormat) -> pl.Series:
    """Token ids of reference texts y after x_ids, each with the id that ends it."""
    form = response_form(tokenizer, prompt_format)
    ids = pl.Series([], dtype=pl.List(pl.Int32))
    for part in rows.iter_slices(_TOKENIZED_AT_ONCE):
        found = ids_after(tokenizer, part["x_ids"].to_list(), part["y"].to_list(), form.lead)
        ids.append(pl.Series([[*row, form.end] for row in found], dtype=ids.dtype))
    return ids
