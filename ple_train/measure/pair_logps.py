"""log pi(y|x) and log pi(y_prompt|x) of stored pairs under one policy, kept by shard so that nothing is computed twice.

Those of the start policy lie beside the store, in DATA/logps, for every training and `ple purity`. A file is named by
its shard's hash, its folder by the policy's digest and the number type, and both are written whole. Trains nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch

from ple_data.common.digests import digests_of, json_digest
from ple_data.common.progress import Progress
from ple_data.storage.parquet import parquet_bytes
from ple_data.storage.store import Shard, Store
from ple_train.engine.output import LOGPS
from ple_train.measure.perplexity import negative_log_likelihoods
from ple_train.model import batches
from ple_train.model.policy import Policy
from ple_train.model.shard import in_parts, in_step
from ple_train.snapshot import SnapshotShard
from schemas import tables
from schemas.errors import DamagedError, NewerError, UsageError
from schemas.files import refuse_outside, write_atomic
from schemas.tables import ARMS

KIND = "purity_logps"
PAIRS_AT_ONCE = 256
MEASURED = ["query_id", "round", "sample", "s", "s_prompt", "x_ids", "y_ids", "y_prompt_ids"]


def file_name(shard: Shard) -> str:
    """Of what is kept of a shard."""
    return f"{shard.sha256[:16]}.parquet"


@dataclass(frozen=True)
class StartLogps:
    """The start policy's log-probabilities: `name` with digests, the number type, and where they are kept of a store
    that cannot be written."""

    name: str
    precision: str
    spare: Path

    def path(self, root: Path, shard: Shard) -> Path:
        """Where they are kept of a shard of the store `root`."""
        place = Path(LOGPS, json_digest([digests_of(self.name), self.precision]), file_name(shard))
        beside = root / place
        nearest = next(parent for parent in beside.parents if parent.exists())
        return beside if beside.exists() or os.access(nearest, os.W_OK) else self.spare / place

    def fill(self, policy: Policy, shards: Sequence[SnapshotShard], batch_tokens: int, accelerator: Any) -> None:
        """Compute what is not kept yet, each process a part; `policy` answers as pi_0 with its adapter off.

        Raises UsageError for token ids that are not the model's, DamagedError (a shard), PleError (the disk).
        """
        mine = shards[accelerator.process_index :: accelerator.num_processes]  # whatever others have written meanwhile
        mine = [part for part in mine if not self.path(part.store, part.shard).exists()]
        if mine or in_parts(policy):
            total = sum(part.shard.rows for part in mine)
            progressing = Progress("the start policy's log-probabilities", total, "pairs")
            with progressing as progress, policy.as_start_policy(), in_step(policy):
                for part in mine:
                    path = self.path(part.store, part.shard)
                    refuse_outside(part.store if path.is_relative_to(part.store) else self.spare, path)
                    rows = Store(part.store).read(part.shard, columns=MEASURED)
                    found = measured(policy, self.name, self.precision, rows, part.shard.path, batch_tokens)
                    write_atomic(path, parquet_bytes(KIND, found, {}))
                    progress.advance(part.shard.rows)
        accelerator.wait_for_everyone()

    def are_kept(self, shards: Sequence[SnapshotShard], accelerator: Any) -> bool:
        """Whether they are there of all shards, in the eyes of every process."""
        missing = sum(not self.path(part.store, part.shard).exists() for part in shards)
        total = accelerator.reduce(torch.tensor(float(missing), device=accelerator.device), "sum")
        return not total.item()

    def of(self, part: SnapshotShard) -> pl.DataFrame:
        """`start_y` and `start_y_prompt` of a shard's rows, in their order: sums in nats, null where empty."""
        rows = read_kept(self.path(part.store, part.shard), part.shard, [f"sum_logps_{arm}" for arm in ARMS])
        return pl.DataFrame({f"start_{arm}": pl.from_arrow(rows[f"sum_logps_{arm}"]) for arm in ARMS})


def read_kept(path: Path, shard: Shard, columns: list[str] | None = None) -> pa.Table:
    """What is kept of a shard, of these columns alone where they are given. Raises DamagedError."""
    try:
        table = tables.read_table(path, KIND, columns)
    except NewerError:
        raise
    except DamagedError as error:
        what = str(error).split(": restore it", 1)[0]
        raise DamagedError(f"{what}: remove it and run the command again, which computes it anew") from error
    if table.num_rows != shard.rows:
        raise DamagedError(
            f"{path}: {table.num_rows} rows instead of {shard.rows}: remove it and run the command again"
        )
    return table


def measured(policy: Policy, name: str, precision: str, rows: pa.Table, path: Path, batch_tokens: int) -> pa.Table:
    """The rows of a shard (`MEASURED`) in the columns of `purity_logps`, as the policy computes in training.

    name: of the policy, with digests; path: of the shard, in messages. Raises UsageError for token ids that are not the
    model's.
    """
    found = []
    for first in range(0, len(rows), PAIRS_AT_ONCE):
        part = rows.slice(first, PAIRS_AT_ONCE).to_pylist()
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=precision == "bf16"):
            pairs = list(_sum_logps(policy, part, path, batch_tokens))
        for record, sums in zip(part, pairs, strict=True):
            row = record | {"policy": name, "margin": record["s_prompt"] - record["s"]}
            for arm, total in zip(ARMS, sums, strict=True):
                row[f"sum_logps_{arm}"] = total
                row[f"mean_logps_{arm}"] = None if total is None else total / len(record[f"{arm}_ids"])
            found.append({column: row[column] for column in tables.PURITY_LOGPS.names})
    return pa.Table.from_pylist(found, schema=tables.PURITY_LOGPS)


def _sum_logps(
    policy: Policy, records: list[dict[str, Any]], path: Path, batch_tokens: int
) -> Iterator[tuple[float | None, float | None]]:
    """log pi(y|x) and log pi(y_prompt|x) of each pair in nats; equal responses get the very same number."""
    sequences = []
    for index, record in enumerate(records):
        for arm in ARMS if record["y_ids"] != record["y_prompt_ids"] else ARMS[:1]:
            ids = np.array(record["x_ids"] + record[f"{arm}_ids"], dtype=np.int32)
            if ids.size and ids.max() >= policy.vocabulary:
                raise UsageError(
                    f"{path}: query {record['query_id']!r} of round {record['round']}: {arm}_ids holds token "
                    f"{ids.max()}, but the model's vocabulary has {policy.vocabulary}; these pairs were made with "
                    "another tokenizer"
                )
            sequence = batches.Sequence(ids, len(record["x_ids"]), (index, arm), query=index)
            if sequence.response > 0 and (policy.positions is None or ids.size <= policy.positions):
                sequences.append(sequence)
    nats = negative_log_likelihoods(policy, sequences, batch_tokens)
    sums = {sequences[place].tag: -value for batch in nats for place, value in batch}
    for index, record in enumerate(records):
        same = record["y_ids"] == record["y_prompt_ids"]
        yield sums.get((index, "y")), sums.get((index, "y" if same else "y_prompt"))
