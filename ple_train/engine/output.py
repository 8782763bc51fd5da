"""The directory that a training command writes: locked while it runs, complete when `ple.json` is there.

`.ple/` inside it holds the lock and the checkpoints. It never trains and never loads a model.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq

from ple_data.common.device import describe
from ple_data.common.settings import Settings
from ple_train.engine.checkpoint import Checkpoints, History, as_table, newest_checkpoint, read_state, resolved, saving
from ple_train.engine.tracking import Tracker
from ple_train.log import print_to_log
from ple_train.model.shard import in_parts, whole_weights
from schemas import records
from schemas.errors import DamagedError, LockedError, NewerError, PleError, UsageError
from schemas.files import explained, fsync_dir, fsync_file, locked, refuse_outside, sha256_file, write_atomic
from schemas.options import Written
from schemas.records import TRAINED
from schemas.training import METRICS, Snapshot, Trained

Kind = Literal["ple", "sft", "reward", "baseline"]
SNAPSHOT, LOGPS = "snapshot.json", "logps"
START_AGAIN = "remove it, or rerun with --no-resume"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors")
LAST = ("adapter_config.json", "config.json")
"""Moved into place after the other files: their presence is what other tools take for a finished model."""


class Output:
    """One output directory as a context manager: takes the lock, offers checkpoints, publishes the result."""

    def __init__(self, settings: Settings, kind: Kind, options: Written, accelerator: Any) -> None:
        self.directory, self.kind, self.accelerator = options.output, kind, accelerator
        self.settings, self.resume = settings, options.resume
        self.metrics = options.metrics or self.directory / "metrics.parquet"
        self.private = self.directory / ".ple"
        self._writing = self.private / "writing"
        self.machine: dict[str, Any] = {}
        self.checkpoints = Checkpoints(self.private / "checkpoints", settings, self.machine)
        self.finished = False
        self.found: dict[str, Any] = {}
        self._tracker = Tracker(accelerator)

    def __enter__(self) -> Self:
        main = self.accelerator.is_main_process
        self._refuse_own_input()
        with ExitStack() as lock:
            if main:
                for path in (self.private / "lock", self._writing, self.private / SNAPSHOT, self.checkpoints.directory):
                    refuse_outside(self.directory, path)
                self._take_lock(lock)
                record = self._record()
                if record is not None:
                    self._refuse_another(record)
                if not self.resume:
                    self._forget(record)
            self.accelerator.wait_for_everyone()
            record = read_record(self.directory)
            if record is not None:
                self.settings.refuse_other(resolved(record), self.directory)
                self.finished, self.found = True, record.settings
                if main:
                    self._clear()  # a kill between the record and the end leaves what the next call removes
                    print_to_log(f"{self.directory} is complete already ({record.steps} steps); nothing to do")
            else:
                self._tracker.begin(self.directory, self.settings.values)
            self._lock = lock.pop_all()
        return self

    def note_machine(self, precision: str, **more: str) -> None:
        """Say on stderr, and keep for the record, what was chosen for this machine: device, precision and `more`."""
        self.machine |= {"device": describe(self.accelerator.device), "precision": precision, **more}
        choices = ", ".join(f"{name} {value}" for name, value in more.items())
        print_to_log(f"training on {self.machine['device']} in {precision}" + (f": {choices}" if choices else ""))

    def _refuse_own_input(self) -> None:
        for name in ("model", "adapter"):
            given = self.settings.values.get(name)
            if given and Path(given).resolve() == self.directory.resolve():
                raise UsageError(f"--output {self.directory} is the --{name} itself: use another --output")

    def _record(self) -> Trained | None:
        """The record that is there; with --no-resume a damaged one is none."""
        try:
            return read_record(self.directory)
        except DamagedError as error:
            if self.resume or isinstance(error, NewerError):
                raise
            return None

    def __exit__(self, *exception: object) -> None:
        self._tracker.end()
        self._lock.close()

    def report(self, metrics: dict[str, Any]) -> None:
        """Send one step's metrics to the tracker, where one was asked for."""
        self._tracker.send(metrics)

    def publish(self, model: Any, tokenizer: Any, history: History, title: str, cost: dict[str, float]) -> None:
        """Put model, tokenizer, model card, metrics and, last, the record in place; then drop the checkpoints.

        `cost` (`training_cost`, or none) goes into the record and onto stderr.
        """
        weights = whole_weights(model) if in_parts(model) else None
        if self.accelerator.is_main_process:
            writing = self._writing
            shutil.rmtree(writing, ignore_errors=True)
            _order_target_modules(model)
            with saving(writing):
                save_model(model, writing, weights)
                tokenizer.save_pretrained(writing)
                write_atomic(writing / "README.md", model_card(title, self.settings.values, history))
            names = sorted((p.name for p in writing.iterdir() if p.is_file()), key=lambda name: (name in LAST, name))
            hashes = {name: sha256_file(writing / name) for name in names}
            for name in names:
                fsync_file(writing / name)
                os.replace(writing / name, self.directory / name)
            fsync_dir(self.directory)
            sink = pa.BufferOutputStream()
            pq.write_table(metrics_table(history), sink)
            write_atomic(self.metrics, sink.getvalue().to_pybytes())
            record = Trained(
                kind=self.kind,
                settings=self.settings.values,
                steps=len(history),
                machine=self.machine,
                cost=cost,
                files=hashes,
                packages={name: importlib.metadata.version(name) for name in PACKAGES},
            )
            write_atomic(self.directory / TRAINED, record.to_json())
            self._clear()
            if cost:
                reused = f" ({cost['tokens_reused']:,} more from earlier rounds)" if cost["tokens_reused"] else ""
                tokens = f"{cost['tokens_sampled']:,} tokens sampled{reused}, {cost['tokens_trained']:,} trained on"
                print_to_log(f"{self.directory}: {tokens}, {cost['seconds']:.1f} s")
        self.accelerator.wait_for_everyone()

    def _refuse_another(self, record: Trained) -> None:
        """Raise UsageError for another command's result; --no-resume makes a round's policy anew by another method."""
        replaceable = {record.kind, self.kind} <= {"ple", "baseline"}
        if record.kind != self.kind and (self.resume or not replaceable):
            more = ", or rerun with --no-resume" if replaceable else ""
            raise UsageError(
                f"{self.directory} is the result of another command ({record.kind}): use another --output{more}"
            )

    def _forget(self, record: Trained | None) -> None:
        """Remove what an earlier training left here: an old adapter beside a new model would be loaded with it."""
        found = [self.directory / name for name in (TRAINED, *LAST, *(record.files if record else ()))]
        for path in (*found, self.private / SNAPSHOT):
            with explained(path, "remove"):
                path.unlink(missing_ok=True)
        self._clear()

    def _clear(self) -> None:
        """Remove what only an unfinished training needs."""
        for folder in (self._writing, self.private / "trl", self.private / LOGPS):
            shutil.rmtree(folder, ignore_errors=True)
        self.checkpoints.clear()

    def _take_lock(self, lock: ExitStack) -> None:
        try:
            lock.enter_context(locked(self.private / "lock", f"--output {self.directory}"))
        except (LockedError, DamagedError):
            raise
        except PleError as error:
            raise PleError(f"--output {self.directory} cannot be written: {error}") from error


def read_record(directory: Path) -> Trained | None:
    """`ple.json` of a finished output directory, else None. Raises DamagedError."""
    path = directory / TRAINED
    return records.read_record(Trained, path, "restore it, or rerun with --no-resume") if path.exists() else None


def kept_precision(directory: Path, resume: bool) -> str | None:
    """The number type with which an output was begun: `auto` goes on in it. None where nothing was begun."""
    if not resume:
        return None
    snapshot, newest = directory / ".ple" / SNAPSHOT, newest_checkpoint(directory / ".ple" / "checkpoints")
    settings: dict[str, Any] = {}
    if begun := read_record(directory) or (read_state(newest) if newest else None):
        settings = resolved(begun)
    elif snapshot.exists():
        settings = records.read_record(Snapshot, snapshot, START_AGAIN).settings
    kept = settings.get("precision")
    return None if kept in (None, "auto") else str(kept)


def metrics_table(history: History) -> pa.Table:
    """Metrics of every step as a table: one row a step, numbers only, its version in the metadata."""
    table = as_table(history)
    # where nothing of this kind was in this round: still a number to whoever reads rounds together
    columns = [known.with_type(pa.float64()) if pa.types.is_null(known.type) else known for known in table.schema]
    return table.cast(pa.schema(columns, {b"ple": json.dumps(METRICS).encode()}))


def model_card(title: str, settings: dict[str, Any], history: History) -> str:
    """A model card in the hub's format: what it is, what it was made from, with which settings."""
    base = str(settings["model"])
    whole = settings.get("full") or settings.get("merge")
    rows = "\n".join(f"| {name} | `{value}` |" for name, value in settings.items() if value is not None)
    return (
        f"---\nbase_model: {json.dumps(base)}\nlibrary_name: {'transformers' if whole else 'peft'}\n"
        f"tags: [ple, alignment]\n---\n\n# {title}\n\n"
        "Trained with the toolkit of PLE, Progressively Label Enhancement (Liu, Xu, Geng, ICML 2025).\n\n"
        f"Steps: {len(history)}. Last loss: {history[-1]['loss']:.4f}.\n\n"
        f"| setting | value |\n| --- | --- |\n{rows}\n"
    )


def save_model(model: Any, directory: Path, weights: dict[str, Any] | None = None) -> None:
    """`save_pretrained`, of these weights where they are given, with the generation configuration that came:
    transformers loads some that it will not save (sampling numbers without do_sample)."""
    came = getattr(model, "generation_config", None)
    if came is not None:
        model.generation_config = type(came)()
    model.save_pretrained(directory, **({} if weights is None else {"state_dict": weights}))
    if came is not None and (file := directory / "generation_config.json").exists():
        came.to_json_file(file, keys_to_pop=["compile_config"])


def _order_target_modules(model: Any) -> None:
    """PEFT keeps the names of the adapted modules as a set, whose order in adapter_config.json differs by process."""
    for config in getattr(model, "peft_config", {}).values():
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)


def training_cost(
    history: History, sampled: Mapping[Any, int], this_round: int | None, trained: int | None = None
) -> dict[str, float]:
    """What a training cost, so that methods are compared at equal cost: `cost` in ple.json.

    sampled: response tokens by the round (None where there is none) that they were sampled for, whether trained on or
    not; those of earlier rounds count as reused. trained: response tokens with a weight in the loss, counted once a
    pass (else the sum over the steps). seconds: of all steps, across restarts, without loading and saving.
    """
    new = sampled.get(this_round, 0)
    return {
        "tokens_sampled": new,
        "tokens_reused": sum(sampled.values()) - new,
        "tokens_trained": int(sum(step["trained_tokens"] for step in history) if trained is None else trained),
        "seconds": round(sum(step["seconds"] for step in history), 3),
    }
