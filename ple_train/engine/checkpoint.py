"""Checkpoints of a training run: atomic directories of safetensors and JSON, enough to go on bit by bit.

`DIR/checkpoint-00000012/` holds the state after 12 steps: trainable weights, optimizer moments, metrics so far and
`state.json`. A directory appears whole or not at all; only the newest is kept. Nothing is ever unpickled.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ple_data.common.settings import Settings
from ple_train.model.shard import fill, like, whole
from schemas.errors import DamagedError, PleError, UsageError, first_line
from schemas.files import explained, fsync_dir, fsync_file, refuse_no_file, refuse_outside
from schemas.records import read_record
from schemas.training import CheckpointState, Trained

History = list[dict[str, Any]]
"""The metrics of every step."""


def as_table(history: History) -> pa.Table:
    """A row a step, with the metrics of all steps; null where a step has none of that name."""
    names = dict.fromkeys(name for step in history for name in step)
    return pa.table({name: [step.get(name) for step in history] for name in names})


@contextmanager
def saving(temporary: Path) -> Iterator[None]:
    """Files being written to a temporary directory: it is removed, and the PleError says why, when the disk is full."""
    try:
        with explained(temporary):
            yield
    except PleError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


class Checkpoints:
    """The checkpoints in one directory, written with one command's settings; `machine` is kept beside them."""

    def __init__(self, directory: Path, settings: Settings, machine: dict[str, Any] | None = None) -> None:
        self.directory, self.settings = directory, settings
        self.machine = {} if machine is None else machine

    def save(self, step: int, weights: dict[str, Tensor], moments: dict[str, Tensor], metrics: History) -> None:
        """Write the state after `step` steps (`training_state`), then drop the older ones."""
        self.directory.mkdir(parents=True, exist_ok=True)
        target = self.directory / f"checkpoint-{step:08d}"
        if target.exists():
            return
        for leftover in self.directory.glob("writing*"):  # the lock says that nobody is at it
            shutil.rmtree(leftover, ignore_errors=True)
        writing = self.directory / "writing"
        writing.mkdir()
        with saving(writing):
            save_file(weights, writing / "weights.safetensors")
            save_file(moments, writing / "optimizer.safetensors")
            pq.write_table(as_table(metrics), writing / "metrics.parquet")
            command = self.settings.kind.__name__
            state = CheckpointState(command=command, step=step, settings=self.settings.values, machine=self.machine)
            (writing / "state.json").write_text(state.to_json())
        for file in writing.iterdir():
            fsync_file(file)
        fsync_dir(writing)
        os.rename(writing, target)
        fsync_dir(self.directory)
        for older in self.directory.glob("checkpoint-*"):
            if older.name < target.name:
                shutil.rmtree(older, ignore_errors=True)

    def restore(self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> tuple[int, History]:
        """Load the newest checkpoint in place → (steps done, metrics so far); (0, []) where there is none.

        Raises UsageError when it was written with other settings, DamagedError when it cannot be read.
        """
        newest = newest_checkpoint(self.directory)
        if newest is None:
            return 0, []
        state = read_state(newest)
        weights, moments = (_read(newest / f"{name}.safetensors", load_file) for name in ("weights", "optimizer"))
        metrics = _read(newest / "metrics.parquet", lambda path: pq.ParquetFile(path).read().to_pylist())
        if state.command not in (None, self.settings.kind.__name__):
            raise UsageError(f"{newest} is another command's ({state.command}): use another --output, or --no-resume")
        self.settings.refuse_other(resolved(state), newest)
        held, wanted = ({name: value.shape for name, value in of.items()} for of in (weights, parameters))
        known = {name.rpartition("|")[0] for name in moments} <= parameters.keys()
        if held != wanted or not known or len(metrics) != state.step:
            raise DamagedError(f"{newest} does not hold what is trained here: {_advice(newest)}")
        for name, parameter in parameters.items():
            fill(parameter, weights[name])
        for full_name, moment in moments.items():
            name, key = full_name.rsplit("|", 1)
            optimizer.state[parameters[name]][key] = moment if key == "step" else like(parameters[name], moment)
        return state.step, metrics

    def clear(self) -> None:
        """Forget all checkpoints."""
        shutil.rmtree(self.directory, ignore_errors=True)


def training_state(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, *, keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and optimizer moments by name, whole and on the host.

    Where they are in parts, all processes call it; those that do not `keep` give their parts and have nothing after it.
    """
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state = {f"{name}|{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
        for found, tensors in ((weights, {name: parameter}), (moments, state)):
            for full_name, tensor in tensors.items():
                together = whole(tensor.detach())
                if keep:
                    found[full_name] = together.contiguous().cpu()
    return weights, moments


def newest_checkpoint(directory: Path) -> Path | None:
    """The last complete checkpoint in a directory."""
    found = [p for p in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{8}", p.name)]
    newest = max(found, default=None, key=lambda p: p.name)
    if newest is not None:
        for path in (newest, *newest.iterdir()):
            refuse_outside(directory.parent, path)
    return newest


def read_state(checkpoint: Path) -> CheckpointState:
    """What a checkpoint says of itself. Raises DamagedError."""
    state = read_record(CheckpointState, checkpoint / "state.json", _advice(checkpoint))
    if checkpoint.name != f"checkpoint-{state.step:08d}":
        raise DamagedError(f"{checkpoint} holds the state after {state.step} steps: {_advice(checkpoint)}")
    return state


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    """What `read` makes of a file of a checkpoint."""
    refuse_no_file(path)
    try:
        with explained(path, "read"):
            return read(path)
    except PleError:
        raise
    except Exception as error:
        raise DamagedError(f"{path} cannot be read ({first_line(error)}): {_advice(path.parent)}") from error


def resolved(record: CheckpointState | Trained) -> dict[str, Any]:
    """The settings of a record, with the number type that was chosen."""
    chosen = {"precision": record.machine["precision"]} if "precision" in record.machine else {}
    return {**record.settings, **chosen}


def _advice(checkpoint: Path) -> str:
    return f"delete {checkpoint.name}, or rerun with --no-resume"
