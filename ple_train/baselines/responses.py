"""`ple baseline sft | context-distillation | raft`: methods that PLE is compared with, on the rows of the same store.

Each takes the place of ple-train in a run: pairs up to round T in, the next policy's LoRA adapter out. All three are
Eq. 1 on chosen responses (`ple_data.selection` chooses), by the token ids that were sampled; on-policy distillation is
reverse KL instead. Never samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from ple_data import selection
from ple_data.common.tokens import ids_after
from ple_data.inputs.templates import instructed, response_form
from ple_data.sampling.terms import rendered_again
from ple_data.storage.store import Store, asked_as_chat, scan_shards
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
from schemas.options import Baseline, BaselineSft, ContextDistillation, PromptFormat, Prompting

ON_POLICY = "on-policy context-distillation"
CHOOSERS = {"context-distillation": selection.guided, "raft": selection.best_of_n}
SAMPLED_FOR = {"context-distillation": ("y_prompt_ids",), "raft": ("y_ids", "y_prompt_ids"), "sft": ()}
SAMPLED_FOR[ON_POLICY] = ("y_ids",)
"""The ids whose sampling a method needs, whether it trains on them or not."""
CHOSEN_FROM = ["query_id", "round", "sample", "s", "s_prompt", "reward_model", "x_ids", "y_ids", "y_prompt_ids"]
CHOSEN_FROM += ["y_answered", "y_prompt_answered"]
REFERENCE_COLUMNS = ["query_id", "round", "x_ids", "reference"]
GUIDED_COLUMNS = ["query_id", "round", "x", "x_ids", "y_ids", "y_prompt_ids", "principle"]
_TOKENIZED_AT_ONCE = 1024


def baseline(method: str, options: Baseline) -> None:
    """Train `model` (from `adapter` on, where given) by Eq. 1 on the responses that `method` chooses; write `output`.

    method: `context-distillation` (y_prompt given x) and `sft` (the queries' references) take all rounds ≤ `round`, as
    ple-train does; `raft` (the best response of each query) takes `round` alone, as RAFT trains on the samples of the
    current policy. `sft` takes BaselineSft: also files of (x, y) rows instead of stores, and then needs no `round`.
    `context-distillation` takes ContextDistillation: with `on_policy`, instead of Eq. 1, reverse KL on `round`'s y.
    Raises UsageError, DamagedError (a shard), LockedError (another process writes `output`), PleError (NaN).
    """
    snapshots.refuse_doubled_stores(options.data)
    files = _files(options.data) if isinstance(options, BaselineSft) else []
    learns = ON_POLICY if isinstance(options, ContextDistillation) and options.on_policy else method
    if not files:
        _refuse_for_stores(options)
    if learns == ON_POLICY and options.full:
        raise UsageError("--on-policy needs the start policy: the model with its adapter off, so not with --full")
    first = options.round if learns in ("raft", ON_POLICY) else 0
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
            renders = instructed(tokenizer, options)
            sequences = [s for path in files for s in read_sequences(path, renders, *how)]
        else:
            longest_pair = None if method == "sft" else options.max_length  # a reference's pair is not trained on
            snapshot = snapshots.frozen_snapshot(session, options.data, options.round, longest_pair, first)
            sequences = choose(learns, snapshot, options.max_length, tokenizer, policy)
            sampled = snapshots.sampled_by_round(snapshot, SAMPLED_FOR[learns])
            if learns == "raft":
                note_principle(scan_shards("pairs", [part.shard for part in snapshot]))
            if learns == ON_POLICY and session.accelerator.is_main_process:
                snapshots.warn_of_another_sampler(snapshot, options.round, session.weights)
        stream = sequence_stream(sequences, policy, options)
        history = session.fit(policy, stream, make_objective("distillation" if learns == ON_POLICY else "sft", policy))
        what = learns if options.round is None else f"{learns}, round {options.round}"
        session.finish(policy.model, history, what, sampled=sampled)


def _refuse_for_stores(options: Baseline) -> None:
    if options.round is None:
        raise UsageError("--round is missing: it says up to which round the pairs of --data are taken")
    if isinstance(options, BaselineSft) and options.part(Prompting) != Prompting():
        raise UsageError(
            "--prompt-format, --system and --chat-template-arg go with files of (x, y) rows; the pairs of a folder "
            "have their prompts: leave them out"
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
    elif method == ON_POLICY:
        rows = with_guided_ids(snapshot, tokenizer, max_length)
    else:
        frames = [CHOOSERS[method](snapshots.read_rows(part, CHOSEN_FROM, max_length)) for part in snapshot]
        rows = selection.best(pl.concat(frames)) if method == "raft" else pl.concat(frames)
    sequences = []
    for row in rows.select(pl.col("^(query_id|round|x_ids|ids|guided_ids)$")).iter_rows(named=True):
        ids, beside = checked_ids(row, "ids", "response", limits), _under_principle(row, limits)
        sequence = Sequence(ids, len(row["x_ids"]), beside=beside)
        longest = max(len(s.ids) for s in (sequence, beside) if s)
        if sequence.response > 0 and (max_length is None or longest <= max_length):
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


def _under_principle(row: dict[str, Any], limits: Limits) -> Sequence | None:
    """The same response after [p, x], where a method asks for it, with as many tokens to train on as after x."""
    if "guided_ids" not in row:
        return None
    ids = checked_ids({**row, "x_ids": row["guided_ids"]}, "ids", "response with the principle", limits)
    return Sequence(ids, len(row["guided_ids"]) + (not row["x_ids"]))


def with_guided_ids(snapshot: list[snapshots.SnapshotShard], tokenizer: Any, max_length: int | None) -> pl.DataFrame:
    """The plain responses (`ids`) and [p, x] (`guided_ids`) as it was sampled from, rendered again.

    Raises UsageError where the ids of x do not come out as they are stored.
    """
    frames = []
    for part in snapshot:
        made = Store(part.store).provenance(part.shard)
        rows = snapshots.read_rows(part, GUIDED_COLUMNS, max_length).rename({"y_ids": "ids"})
        for (principle,), own in rows.group_by("principle", maintain_order=True):
            plain, guided = rendered_again(tokenizer, own["x"].to_list(), str(principle), made)
            if plain != own["x_ids"].to_list():
                raise UsageError(
                    f"{part.shard.path}: this tokenizer makes other prompts of its queries than were sampled from, so "
                    "[p, x] is not known for --on-policy; give ple-gen's --model, or sample the round again"
                )
            frames.append(own.with_columns(guided_ids=pl.Series(guided, dtype=pl.List(pl.Int32))))
    return pl.concat(frames)


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
