"""`ple purity`: log pi(y_prompt|x) and log pi(y|x) of every stored pair under the policies of a run, given x alone.

Log-probabilities are kept by policy and shard in OUTPUT/logps, so that nothing is computed twice; the mathematics of
Section 5 is in `ple_data.evaluation.purity`. It samples nothing, trains nothing and never changes DATA.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ple_data.common.digests import json_digest, policy_name
from ple_data.common.models import check_adapter, check_model
from ple_data.common.progress import Progress
from ple_data.evaluation.purity import Scored, bin_edges, binned, count, theorem_bound
from ple_data.evaluation.purity_text import format_purity
from ple_data.storage.parquet import parquet_bytes
from ple_data.storage.store import Shard, Store
from ple_train.log import print_to_log
from ple_train.loss import sum_by_response
from ple_train.model.batches import Sequence, micro_batches
from ple_train.model.policy import Policy, load_policy, resolve_precision
from schemas import tables
from schemas.errors import DamagedError, UsageError
from schemas.files import write_atomic
from schemas.options import Purity
from schemas.recipe import load_recipe
from schemas.reports import PurityPolicy, PurityReport
from schemas.tables import ARMS

PAIRS_AT_ONCE = 256
KIND = "purity_logps"
MEASURED = ["query_id", "round", "sample", "s", "s_prompt", "x_ids", "y_ids", "y_prompt_ids"]
_ROUND = re.compile(r"round=(\d+)$")


@dataclass(frozen=True)
class Source:
    """A policy to measure: how to load it, and the round whose training made it (None: the start, or unknown)."""

    label: str
    after_round: int | None
    model: str
    adapter: str | None
    revision: str | None

    @property
    def name(self) -> str:
        return policy_name(self.model, self.adapter, self.revision)


def purity(options: Purity) -> str:
    """Measure every policy on the same pairs; write purity.json and purity.parquet to `output`; give the tables.

    Either `run` (a directory of `ple run`: its start policy, that of each finished round, its data, RUN/purity), or
    `model` with `data` and `output` and the adapters in the order in which they were trained. `round` restricts the
    pairs (not the policies). Raises UsageError, DamagedError (a shard or a kept file).
    """
    sources, stores, output = _what(options)
    round, normalized = options.round, options.normalized
    shards = [(store, shard) for store in stores for shard in store.shards("pairs")]
    missing = sorted(set(round) - {shard.round for _, shard in shards})
    if missing:
        raise UsageError(f"--round {missing[0]}: no pairs of that round in {_names(stores)}")
    shards = [(store, shard) for store, shard in shards if not round or shard.round in round]
    if not any(shard.rows for _, shard in shards):
        raise UsageError(f"no pairs in {_names(stores)}: generate and score them first")

    resolved = resolve_precision(options.precision)
    measured, vocabulary = [], 0
    for source in sources:
        pieces, vocabulary = _measure(source, shards, output, resolved, options.microbatch_tokens)
        measured.append(pa.concat_tables(pieces))
    report = _report(sources, measured, vocabulary, normalized, resolved, stores)
    whole = pa.concat_tables(measured)
    write_atomic(output / "purity.parquet", parquet_bytes(KIND, whole, {}))
    write_atomic(output / "purity.json", report.to_json())
    print_to_log(f"written: {output / 'purity.json'}, {output / 'purity.parquet'} ({whole.num_rows} rows)")
    return format_purity(report)


def _what(options: Purity) -> tuple[list[Source], list[Store], Path]:
    """Policies, stores and output directory; existence and fit of every model are checked before any is loaded."""
    run, data, output = options.run, options.data, options.output
    if (run is None) == (options.model is None):
        raise UsageError("give either --run RUN, or --model with --data and --output")
    if run is not None:
        if options.adapter or options.revision:
            raise UsageError("--run finds the policies itself: leave out --adapter and --revision")
        sources = _policies_of_run(run)
        data = data or (run / "data",)
        output = output or run / "purity"
    else:
        if not data or output is None:
            raise UsageError("--model needs --data and --output")
        sources = _policies_given(str(options.model), options.adapter, options.revision)
    for source in sources:
        check_model(source.model)
        if source.adapter:
            check_adapter(source.adapter, source.model)
    return sources, [Store(root) for root in data], output


def _names(stores: list[Store]) -> str:
    return ", ".join(str(store.root) for store in stores)


def _policies_of_run(run: Path) -> list[Source]:
    if not (run / "recipe.yaml").is_file():
        raise UsageError(f"--run {run}: no run directory (it has no recipe.yaml); give --model, --adapter and --data")
    recipe = load_recipe(run / "recipe.yaml")
    start, revision = (str(run / "sft"), None) if recipe.sft else (recipe.model, recipe.revision)
    sources = [Source("start", None, start, None, revision)]
    for directory in sorted((run / "policy").glob("round=*")):
        place = _ROUND.search(directory.name)
        if place is None or not (directory / "ple.json").is_file():  # its last file: without it, not finished
            continue
        t, whole = int(place[1]), not (directory / "adapter_config.json").is_file()
        found = (str(directory), None, None) if whole else (start, str(directory), revision)
        sources.append(Source(f"after {t}", t, *found))
    return sources


def _policies_given(model: str, adapters: tuple[str, ...], revision: str | None) -> list[Source]:
    sources = [Source("start", None, model, None, revision)]
    for adapter in adapters:
        place = _ROUND.search(Path(adapter).name)
        label, t = (f"after {int(place[1])}", int(place[1])) if place else (Path(adapter).name, None)
        if label in {source.label for source in sources}:
            label = adapter
        sources.append(Source(label, t, model, adapter, revision))
    return sources


def _measure(
    source: Source, shards: list[tuple[Store, Shard]], output: Path, precision: str, microbatch_tokens: int
) -> tuple[list[pa.Table], int]:
    """The rows of every shard under one policy, computed where they are not kept yet, and the policy's |V|."""
    name = source.name
    directory = output / "logps" / json_digest([name, precision])
    paths = [directory / f"{shard.sha256[:16]}.parquet" for _, shard in shards]
    to_do = [index for index, path in enumerate(paths) if not path.exists()]
    done = sum(shard.rows for _, shard in shards) - sum(shards[index][1].rows for index in to_do)
    policy = None
    with Progress(f"purity of {source.label}", sum(shard.rows for _, shard in shards), "pairs", done=done) as progress:
        for index in to_do:
            if policy is None:
                loaded = load_policy(
                    source.model, adapter=source.adapter, revision=source.revision, precision=precision
                )
                policy = loaded.eval()
                progress.restart_clock()
            store, shard = shards[index]
            rows = store.read(shard, columns=MEASURED)
            scored = _score(policy, name, rows, shard.path, microbatch_tokens)
            write_atomic(paths[index], parquet_bytes(KIND, scored, {}))
            progress.advance(shard.rows)
    return [_read_piece(path, shard) for path, (_, shard) in zip(paths, shards, strict=True)], _vocabulary(source)


def _vocabulary(source: Source) -> int:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source.model, revision=source.revision).get_text_config().vocab_size


def _read_piece(path: Path, shard: Shard) -> pa.Table:
    table = tables.read_table(path, KIND)
    if table.num_rows != shard.rows:
        raise DamagedError(
            f"{path}: {table.num_rows} rows instead of {shard.rows}: remove it and run the command again"
        )
    return table


def _score(policy: Policy, name: str, rows: pa.Table, path: Path, microbatch_tokens: int) -> pa.Table:
    """The rows of a shard in the columns of `purity_logps`."""
    records = rows.to_pylist()
    columns: dict[str, list[Any]] = {field: [] for field in tables.PURITY_LOGPS.names}
    for first in range(0, len(records), PAIRS_AT_ONCE):
        part = records[first : first + PAIRS_AT_ONCE]
        for record, sums in zip(part, _sum_logps(policy, part, path, microbatch_tokens), strict=True):
            columns["policy"].append(name)
            for field in ("query_id", "round", "sample", "s", "s_prompt"):
                columns[field].append(record[field])
            columns["margin"].append(record["s_prompt"] - record["s"])
            for arm, total in zip(ARMS, sums, strict=True):
                length = len(record[f"{arm}_ids"])
                columns[f"sum_logps_{arm}"].append(total)
                columns[f"mean_logps_{arm}"].append(None if total is None else total / length)
    return pa.table(columns, schema=tables.PURITY_LOGPS)


def _sum_logps(
    policy: Policy, records: list[dict[str, Any]], path: Path, microbatch_tokens: int
) -> Iterator[tuple[float | None, float | None]]:
    """log pi(y|x) and log pi(y_prompt|x) of each pair in nats; equal responses get the very same number."""
    sequences: dict[tuple[int, str], Sequence] = {}
    for index, record in enumerate(records):
        for arm in ARMS if record["y_ids"] != record["y_prompt_ids"] else ARMS[:1]:
            ids = np.array(record["x_ids"] + record[f"{arm}_ids"], dtype=np.int32)
            if ids.size and ids.max() >= policy.vocabulary:
                raise UsageError(
                    f"{path}: query {record['query_id']!r} of round {record['round']}: {arm}_ids holds token "
                    f"{ids.max()}, but the model's vocabulary has {policy.vocabulary}; these pairs were made with "
                    "another tokenizer"
                )
            sequence = Sequence(ids, len(record["x_ids"]), (index, arm), query=index)
            if sequence.response > 0 and (policy.positions is None or ids.size <= policy.positions):
                sequences[index, arm] = sequence
    sums: dict[tuple[int, str], float] = {}
    with torch.no_grad():
        for batch in micro_batches(list(sequences.values()), 1, microbatch_tokens, 1, 0, layout=policy.layout):
            tokens = policy.collate(batch.sequences)
            found = sum_by_response(policy(tokens).double(), tokens.responses, len(batch.sequences))
            sums |= {sequence.tag: total for sequence, total in zip(batch.sequences, found.tolist(), strict=True)}
    for index, record in enumerate(records):
        same = record["y_ids"] == record["y_prompt_ids"]
        yield sums.get((index, "y")), sums.get((index, "y" if same else "y_prompt"))


def _report(
    sources: list[Source],
    measured: list[pa.Table],
    vocabulary: int,
    normalized: bool,
    precision: str,
    stores: list[Store],
) -> PurityReport:
    which = "mean_logps" if normalized else "sum_logps"
    policies = []
    first = measured[0]
    margin, rounds = first["margin"].to_numpy(), first["round"].to_numpy().astype(np.int64)
    edges = bin_edges(margin)
    for source, rows in zip(sources, measured, strict=True):
        ratio = _floats(rows[f"{which}_y_prompt"]) - _floats(rows[f"{which}_y"])
        pairs = Scored(margin, ratio, rounds)
        policies.append(
            PurityPolicy(
                label=source.label,
                policy=rows["policy"][0].as_py(),
                after_round=source.after_round,
                left_out=int(np.isnan(ratio).sum()),
                all_pairs=count(pairs),
                by_round=[count(pairs, t) for t in sorted(set(rounds.tolist()))],
                bins=binned(pairs, edges),
            )
        )
    pure_sets = [policy.all_pairs.pure_sets for policy in policies]
    bound = theorem_bound(first["s"].to_numpy(), first["s_prompt"].to_numpy(), pure_sets[0], pure_sets[-1], vocabulary)
    return PurityReport(
        data=[str(store.root) for store in stores],
        rounds=sorted(set(rounds.tolist())),
        normalized=normalized,
        precision=precision,
        policies=policies,
        bound=bound,
    )


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    """float64, NaN for null."""
    return column.to_numpy(zero_copy_only=False).astype(np.float64)
