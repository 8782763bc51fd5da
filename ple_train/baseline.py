"""`ple baseline sft | context-distillation | raft`: methods that PLE is compared with, on the rows of the same store.

Each takes the place of ple-train in a run: pairs up to round T in, the next policy's LoRA adapter out. All three are
Eq. 1 on chosen responses (`ple_data.selection` chooses), by the token ids that were sampled. Never samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ple_data import selection
from ple_data.digests import policy_name
from ple_data.models import check_adapter, check_model, load_tokenizer
from ple_data.principles import PromptFormat
from ple_data.store import scan_shards
from ple_train.batches import Sequence
from ple_train.cost import training_cost
from ple_train.log import print_to_log
from ple_train.loop import LoopSettings, make_accelerator, train_loop
from ple_train.output import Output
from ple_train.pairs import Limits, SnapshotShard, read_rows, refuse_foreign_ids, sampled_by_round
from ple_train.policy import load_policy, resolve_precision
from ple_train.sft import SftObjective, read_sequences
from ple_train.tabular import ShuffledSequences, file_digest, refuse_too_long
from ple_train.train import frozen_snapshot, note_later_pairs, note_principle, refuse_doubled_stores, refuse_other_lora
from schemas.errors import UsageError

LEARNING_RATE = 1e-4
CHOOSERS = {"context-distillation": selection.guided, "raft": selection.best_of_n}
SAMPLED_FOR = {"context-distillation": ("y_prompt_ids",), "raft": ("y_ids", "y_prompt_ids"), "sft": ()}
"""The ids whose sampling a method needs, whether it trains on them or not."""
COLUMNS = ["query_id", "round", "sample", "s", "s_prompt", "x_ids", "y_ids", "y_prompt_ids"]
REFERENCE_COLUMNS = ["query_id", "round", "x_ids", "reference"]
_TOKENIZED_AT_ONCE = 1024


def baseline(
    method: str,
    *,
    model: str,
    data: list[Path],
    output: Path,
    round: int | None = None,
    adapter: str | None = None,
    revision: str | None = None,
    lora_rank: int = 8,
    lora_alpha: int = 16,
    full: bool = False,
    learning_rate: float = LEARNING_RATE,
    epochs: int = 1,
    batch_size: int = 16,
    max_length: int | None = None,
    prompt_format: PromptFormat = "auto",
    max_grad_norm: float = 1.0,
    seed: int = 0,
    resume: bool = True,
    precision: str = "auto",
    attention: str = "auto",
    gradient_checkpointing: bool = False,
    microbatch_tokens: int = 8192,
    checkpoint_every: int = 100,
    metrics: Path | None = None,
    report_to: str | None = None,
) -> None:
    """Train `model` (from `adapter` on, where given) by Eq. 1 on the responses that `method` chooses; write `output`.

    method: `context-distillation` (y_prompt given x) and `sft` (the queries' references) take all rounds ≤ `round`, as
    ple-train does; `raft` (the best response of each query) takes `round` alone, as RAFT trains on the samples of the
    current policy. `sft` also takes files of (x, y) rows instead of stores, and then needs no `round`; `prompt_format`
    is how their x becomes a prompt. `batch_size` is in responses. Pairs (in `sft` references) longer than `max_length`
    ids with x are left out, and counted on stderr.
    Raises UsageError, DamagedError (a shard), LockedError (another process writes `output`), PleError (NaN).
    """
    settings: dict[str, Any] = dict(locals())
    for name in ("output", "resume", "checkpoint_every", "metrics", "report_to"):
        del settings[name]
    check_model(model)
    if adapter:
        refuse_other_lora(check_adapter(adapter, model), lora_rank, lora_alpha)
    refuse_doubled_stores(data)
    files = _files(data) if method == "sft" else []
    if not files and round is None:
        raise UsageError("--round is missing: it says up to which round the pairs of --data are taken")
    if not files and prompt_format != "auto":
        raise UsageError(
            "--prompt-format goes with files of (x, y) rows; the pairs of a folder have their prompts: leave it out"
        )
    if not files:
        del settings["prompt_format"]
    settings["data"] = [str(path) for path in data]
    settings["weights"] = policy_name(model, adapter, revision)
    settings["data_digests"] = [file_digest(path) for path in files]

    accelerator = make_accelerator(report_to, Path(output))
    with Output(output, "baseline", settings, accelerator, resume=resume, metrics=metrics) as out:
        if out.finished:
            if round is not None:
                note_later_pairs(out, data, round, first=round if method == "raft" else 0)
            return
        tokenizer = load_tokenizer(model, revision, note=print_to_log)
        policy = load_policy(
            model,
            adapter=adapter,
            revision=revision,
            full=full,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            precision=precision,
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
            seed=seed,
        )
        sampled: dict[int, int] = {}
        if files:
            sequences = [s for path in files for s in read_sequences(path, tokenizer, max_length, prompt_format)]
            refuse_too_long(sequences, policy.positions, model)
        else:
            assert round is not None
            longest_pair = None if method == "sft" else max_length  # the pair of a reference is not trained on
            snapshot = frozen_snapshot(out, data, round, longest_pair, first=round if method == "raft" else 0)
            sequences = choose(method, snapshot, max_length, tokenizer, policy)
            sampled = sampled_by_round(snapshot, SAMPLED_FOR[method])
            if method == "raft":
                note_principle(scan_shards("pairs", [part.shard for part in snapshot]))
        stream = ShuffledSequences(sequences, batch_size, seed, divisor=lambda batch: sum(s.response for s in batch))
        out.note_machine(resolve_precision(precision), attention=policy.attention, layout=policy.layout)
        loop = LoopSettings(
            learning_rate=learning_rate,
            epochs=epochs,
            seed=seed,
            precision=resolve_precision(precision),
            microbatch_tokens=microbatch_tokens,
            max_grad_norm=max_grad_norm,
            checkpoint_every=checkpoint_every,
        )
        history = train_loop(
            accelerator, policy, policy.trainable(), stream, SftObjective(policy), loop, out.checkpoints, out.report
        )
        new = sampled.pop(round, 0) if round is not None else 0
        cost = training_cost(history, sampled=new, reused=sum(sampled.values()))
        out.finish(policy.model, tokenizer, history, title=title(model, method, round), cost=cost)


def title(model: str, method: str, round: int | None) -> str:
    """The heading of a baseline's model card."""
    return f"{Path(model).name}, {method}" + ("" if round is None else f", round {round}")


def _files(data: list[Path]) -> list[Path]:
    """The files among `data`: all or none. Raises UsageError where one is missing, and for files beside folders."""
    for path in data:
        if not path.exists():
            raise UsageError(f"--data {path}: no such file or folder; correct the path")
    files = [path for path in data if path.is_file()]
    if files and len(files) < len(data):
        raise UsageError("--data holds files and stores; give files of (x, y) rows or stores, not both")
    return files


def choose(
    method: str, snapshot: list[SnapshotShard], max_length: int | None, tokenizer: Any, limits: Limits
) -> list[Sequence]:
    """The responses that a method learns from, as sequences. Raises UsageError where there is none."""
    if method == "sft":
        frames = [selection.references(read_rows(part, REFERENCE_COLUMNS, None)) for part in snapshot]
        rows = selection.first_of_each_query(pl.concat(frames))
        rows = rows.with_columns(reference_ids(rows["y"], tokenizer).alias("ids")).drop("y")
    else:
        frames = [CHOOSERS[method](read_rows(part, COLUMNS, max_length)) for part in snapshot]
        rows = selection.best(pl.concat(frames)) if method == "raft" else pl.concat(frames)
    sequences = []
    for query, round, x_ids, ids in rows.select("query_id", "round", "x_ids", "ids").iter_rows():
        sequence = Sequence(np.array([*x_ids, *ids], dtype=np.int32), len(x_ids))
        refuse_foreign_ids(sequence.ids, f"query {query!r} of round {round}: x and response", limits)
        if sequence.response > 0 and (max_length is None or len(sequence.ids) <= max_length):
            sequences.append(sequence)
    if not sequences:
        raise UsageError(f"{method}: no response to train on in --data{_hint(method)}")
    print_to_log(f"{method}: {len(sequences)} responses{_best_of(rows)}")
    if left_out := rows.height - len(sequences):
        too_long = "" if max_length is None else f", or longer than --max-length {max_length}"
        print_to_log(f"{left_out} responses left out: empty{too_long}")
    return sequences


def reference_ids(texts: pl.Series, tokenizer: Any) -> pl.Series:
    """Token ids of reference texts, each with an end-of-sequence id."""
    ids = pl.Series([], dtype=pl.List(pl.Int32))
    for first in range(0, len(texts), _TOKENIZED_AT_ONCE):
        part = texts[first : first + _TOKENIZED_AT_ONCE].to_list()
        found = tokenizer(part, add_special_tokens=False)["input_ids"]
        ids.append(pl.Series([[*row, tokenizer.eos_token_id] for row in found], dtype=ids.dtype))
    return ids


def _hint(method: str) -> str:
    return ": its queries came without references (see ple-gen --queries)" if method == "sft" else ""


def _best_of(rows: pl.DataFrame) -> str:
    if "n" not in rows.columns:
        return ""
    counts = sorted(set(rows["n"]))
    return f", each the best of {' or '.join(map(str, counts))}"
