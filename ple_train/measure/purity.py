"""`ple purity`: log pi(y_prompt|x) and log pi(y|x) of every stored pair under the policies of a run, given x alone.

Log-probabilities are kept by policy and shard in OUTPUT/logps, so that nothing is computed twice, and those of the
start policy that a training has kept beside DATA are taken. The mathematics of Section 5 is in
`ple_data.evaluation.purity`. It samples nothing, trains nothing and never changes DATA.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ple_data.common.digests import json_digest
from ple_data.common.progress import Progress
from ple_data.evaluation.policies import NamedPolicy, named_policy
from ple_data.evaluation.purity import bin_edges, binned, count, theorem_bound
from ple_data.evaluation.purity_text import format_purity
from ple_data.storage.parquet import parquet_bytes
from ple_data.storage.store import Shard, Store
from ple_train.engine.output import LOGPS
from ple_train.log import print_to_log
from ple_train.measure.pair_logps import KIND, MEASURED, StartLogps, file_name, measured, read_kept
from ple_train.model.policy import load_policy, resolve_precision
from schemas.errors import UsageError
from schemas.files import refuse_outside, write_atomic
from schemas.options import Purity
from schemas.recipe import load_recipe
from schemas.reports import PurityBound, PurityPolicy, PurityReport

_ROUND = re.compile(r"round=(\d+)$")


def purity(options: Purity) -> str:
    """Measure every policy on the same pairs; write purity.json and purity.parquet to `output`; give the tables.

    Either `run` (a directory of `ple run`: its start policy, that of each finished round, its data, RUN/purity), or
    `model` with `data` and `output` and the adapters in the order in which they were trained. `round` restricts the
    pairs (not the policies). Raises UsageError, DamagedError (a shard or a kept file).
    """
    sources, stores, output = _what(options)
    round, where = options.round, ", ".join(str(store.root) for store in stores)
    shards = [(store, shard) for store in stores for shard in store.shards("pairs")]
    missing = sorted(set(round) - {shard.round for _, shard in shards})
    if missing:
        raise UsageError(f"--round {missing[0]}: no pairs of that round in {where}")
    shards = [(store, shard) for store, shard in shards if not round or shard.round in round]
    if not any(shard.rows for _, shard in shards):
        raise UsageError(f"no pairs in {where}: generate and score them first")

    resolved = resolve_precision(options.precision)
    measured = [_measure(source, shards, output, resolved, options.microbatch_tokens) for source in sources]
    compared = "mean_logps" if options.normalized else "sum_logps"
    policies, bound = _policies_and_bound(sources, measured, compared)
    report = PurityReport(
        data=[str(store.root) for store in stores],
        rounds=sorted(set(measured[0]["round"].to_pylist())),
        normalized=options.normalized,
        precision=resolved,
        policies=policies,
        bound=bound,
    )
    whole = pa.concat_tables(measured)
    write_atomic(output / "purity.parquet", parquet_bytes(KIND, whole, {}))
    write_atomic(output / "purity.json", report.to_json())
    print_to_log(f"written: {output / 'purity.json'}, {output / 'purity.parquet'} ({whole.num_rows} rows)")
    return format_purity(report)


def _what(options: Purity) -> tuple[list[NamedPolicy], list[Store], Path]:
    """Policies, stores and output directory; existence and fit of every model are checked before any is loaded."""
    run, data, output = options.run, options.data, options.output
    if (run is None) == (options.model is None):
        raise UsageError("give either --run RUN, or --model with --data and --output")
    if run is not None:
        if options.adapter or options.revision:
            raise UsageError("--run finds the policies itself: leave out --adapter and --revision")
        policies = list(_policies_of_run(run))
        data = data or (run / "data",)
        output = output or run / "purity"
    else:
        if not data or output is None:
            raise UsageError("--model needs --data and --output")
        policies = _policies_given(str(options.model), options.adapter, options.revision)
    return policies, [Store(root) for root in data], output


def _policies_of_run(run: Path) -> Iterator[NamedPolicy]:
    if not (run / "recipe.yaml").is_file():
        raise UsageError(f"--run {run}: no run directory (it has no recipe.yaml); give --model, --adapter and --data")
    recipe = load_recipe(run / "recipe.yaml")
    start, revision = (str(run / "sft"), None) if recipe.sft else (recipe.model, recipe.revision)
    yield named_policy("start", start, revision)
    for directory in sorted((run / "policy").glob("round=*"), key=lambda path: (len(path.name), path.name)):
        place = _ROUND.search(directory.name)
        if place is None or not (directory / "ple.json").is_file():  # its last file: without it, not finished
            continue
        t = int(place[1])
        if (directory / "adapter_config.json").is_file():
            yield named_policy(f"after {t}", start, revision, str(directory), t)
        else:
            yield named_policy(f"after {t}", str(directory), None, None, t)


def _policies_given(model: str, adapters: tuple[str, ...], revision: str | None) -> list[NamedPolicy]:
    policies = [named_policy("start", model, revision)]
    for adapter in adapters:
        place = _ROUND.search(Path(adapter).name)
        label, t = (f"after {int(place[1])}", int(place[1])) if place else (Path(adapter).name, None)
        if label in {policy.label for policy in policies}:
            label = adapter
        policies.append(named_policy(label, model, revision, adapter, t))
    return policies


def _measure(
    source: NamedPolicy, shards: list[tuple[Store, Shard]], output: Path, precision: str, microbatch_tokens: int
) -> pa.Table:
    """The rows of every shard under one policy, computed where neither a training nor purity has kept them."""
    own = output / LOGPS / json_digest([source.name, precision])
    refuse_outside(output, own)
    start = StartLogps(source.name, precision, output)
    beside = [start.path(store.root, shard) for store, shard in shards]
    paths = [path if path.exists() else own / file_name(shard) for path, (_, shard) in zip(beside, shards, strict=True)]
    to_do = [(path, *where) for path, where in zip(paths, shards, strict=True) if not path.exists()]
    total = sum(shard.rows for _, shard in shards)
    done = total - sum(shard.rows for *_, shard in to_do)
    with Progress(f"purity of {source.label}", total, "pairs", done=done) as progress:
        if to_do:
            policy = load_policy(source.model, adapter=source.adapter, revision=source.revision, precision=precision)
            progress.restart_clock()
        for path, store, shard in to_do:
            rows = store.read(shard, columns=MEASURED)
            found = measured(policy, source.name, precision, rows, shard.path, microbatch_tokens)
            write_atomic(path, parquet_bytes(KIND, found, {}))
            progress.advance(shard.rows)
    return pa.concat_tables([read_kept(path, shard) for path, (_, shard) in zip(paths, shards, strict=True)])


def _policies_and_bound(
    sources: list[NamedPolicy], measured: list[pa.Table], logps: str
) -> tuple[list[PurityPolicy], PurityBound]:
    """What a PurityReport counts from the rows of each policy; `logps`: the columns to compare."""
    first = measured[0]
    margin, rounds = first["margin"].to_numpy(), first["round"].to_numpy()
    edges = bin_edges(margin)
    policies = []
    for source, rows in zip(sources, measured, strict=True):
        ratio = pc.subtract(rows[f"{logps}_y_prompt"], rows[f"{logps}_y"]).to_numpy()  # NaN for null
        policies.append(
            PurityPolicy(
                label=source.label,
                policy=rows["policy"][0].as_py(),
                after_round=source.after_round,
                left_out=int(np.isnan(ratio).sum()),
                all_pairs=count(margin, ratio),
                by_round=[count(margin[rounds == t], ratio[rounds == t], t) for t in np.unique(rounds).tolist()],
                bins=binned(margin, ratio, edges),
            )
        )
    start, end = policies[0].all_pairs.pure_sets, policies[-1].all_pairs.pure_sets
    bound = theorem_bound(first["s"].to_numpy(), first["s_prompt"].to_numpy(), start, end)
    return policies, bound
