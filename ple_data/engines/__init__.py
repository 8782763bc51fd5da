"""Engines: token ids in, sampled token ids out, behind one small protocol. Knows nothing of queries or files.

An engine takes units (a unit is a sequence of requests that will be stored together) and yields each request with
its completion as soon as that is finished, in any order. It pulls the next unit when it has room for more.
"""

import difflib
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

from ple_data.common.extras import missing
from ple_data.common.models import AdapterInfo
from ple_data.common.tokens import added_ids, text_after
from schemas.errors import PleError, UsageError
from schemas.json_text import named_values
from schemas.options import ENGINES, Sampling

Probed = list[dict[str, float]]
"""What tells a policy: after some short texts, the log-probabilities of the likeliest tokens, by id."""
TOLERANCE = 0.05
"""Difference of two probes, in nats, up to which they are of the same policy."""


@dataclass(frozen=True, slots=True)
class Request:
    """One response to sample. `key` is the caller's; `seed` alone decides the random numbers."""

    key: Any
    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Completion:
    """A sampled response.

    ids: the sampled token ids. One that stopped ends with its end token (or with the token that completed a stop
    string); one cut by length has no end token. text: what the ids say after the prompt, cut before a stop string.
    logps: the model's log-probability of each id, before penalty, temperature, min-p, top-k and top-p; None where not
    asked for.
    """

    ids: list[int]
    text: str
    finish: Literal["stop", "length"]
    logps: list[float] | None


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is made from, checked before: model, tokenizer, end token ids, longest sequence needed.

    dtype: a number type, or `auto` for what the engine's `resolve_machine` chooses.
    """

    model: str
    revision: str | None
    adapter: AdapterInfo | None
    tokenizer: Any
    end_ids: tuple[int, ...]
    max_length: int
    dtype: str = "auto"

    @cached_property
    def marks(self) -> set[int]:
        """End ids that are tokens of their own and no text."""
        return added_ids(self.tokenizer) & set(self.end_ids)


class EngineDiedError(PleError):
    """An engine's own processes are gone; another one may go on."""


class Engine(Protocol):
    """Samples responses. `close` frees the device and ends every process of the engine; it may be called twice.

    under_way: set by the caller; an engine that sees them tells it how many tokens its unfinished responses have.
    """

    under_way: Callable[[int], None]

    def sample(self, units: Iterator[Sequence[Request]], sampling: Sampling) -> Iterator[tuple[Request, Completion]]:
        """Yield every request of every unit with its completion, in any order."""

    def close(self) -> None:
        """Free what the engine holds."""


def choose_engine(name: str | None, endpoints: Sequence[str] = ()) -> str:
    """`name` checked, or the default: with endpoints `server`, else the first engine whose package is installed.

    Raises UsageError.
    """
    if endpoints and name not in (None, "server"):
        raise UsageError(f"--endpoint is for --engine server, not for {name}: leave one of the two out")
    name = "server" if endpoints else name
    installed = [engine for engine, package in ENGINES.items() if importlib.util.find_spec(package)]
    if name is None:
        return next(iter(installed), "hf")
    if name not in ENGINES:
        raise UsageError(f"--engine must be one of {', '.join(ENGINES)}, not {name}")
    if name not in installed:
        raise missing(ENGINES[name], f"--engine hf works as it is; --engine {name} needs the package")
    return name


def engine_module(name: str) -> Any:
    """The module of an engine, with `start` and two functions for what comes before:

    - check(engine_args, adapter) refuses arguments that there are not, and an adapter that the engine cannot load;
    - resolve_machine(dtype, engine_args) gives the number type and the device, in words, that it will sample with.
      `auto` is bfloat16 where the device computes in it, else float32; never float16, which nobody would notice.
    """
    return importlib.import_module(f"ple_data.engines.{name}")


def make_engine(name: str, spec: EngineSpec, engine_args: Mapping[str, Any]) -> Engine:
    """Start an engine. Raises PleError where it does not start."""
    return engine_module(name).start(spec, engine_args)


def parse_engine_args(texts: Iterable[str]) -> dict[str, Any]:
    """`--engine-arg` as a dictionary. Raises UsageError."""
    return named_values(texts, "--engine-arg")


def refuse_unknown(engine_args: Mapping[str, Any], known: Iterable[str], engine: str) -> None:
    """Raise UsageError for the first argument the engine does not know, with the nearest name that it knows."""
    known = list(known)
    for name in engine_args:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known)[:20])}"
            raise UsageError(f"--engine-arg {name}: the {engine} engine has no such argument; {hint}")


def refuse_no_numbers(engine_args: Mapping[str, Any], least: Mapping[str, float]) -> None:
    """Raise UsageError for an argument below its least, or that is no number; a whole one where its least is an int."""
    for name, smallest in least.items():
        kinds = int if isinstance(smallest, int) else (int, float)
        value = engine_args.get(name, smallest)
        if isinstance(value, bool) or not isinstance(value, kinds) or not smallest <= value < math.inf:
            whole = "a whole number" if kinds is int else "a number"
            raise UsageError(f"--engine-arg {name} must be {whole} of at least {smallest}, not {value!r}")


def refuse_no_plain_lora(adapter: AdapterInfo | None) -> None:
    """Raise UsageError for an adapter of a kind that vLLM cannot load."""
    if adapter is not None:
        unknown = (name for name in ("use_dora", "modules_to_save", "lora_bias") if adapter.config.get(name))
        if found := next(unknown, adapter.changes_base):
            raise UsageError(f"adapter {adapter.path} has {found}, which vllm cannot load; use --engine hf")


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string in it, or all of it."""
    ends = [at for at in (text.find(word) for word in stop) if at >= 0]
    return text[: min(ends)] if ends else text


def response_text(spec: EngineSpec, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """What sampled ids say after their prompt, without special tokens and without the mark that ended them."""
    return text_after(spec.tokenizer, prompt_ids, ids[:-1] if ids and ids[-1] in spec.marks else ids)


def distance_of(found: Probed, expected: Probed) -> float:
    """Mean difference of two probes over the tokens that both name, in nats; infinite where that are few."""
    pairs = [(of[t], by[t]) for of, by in zip(found, expected, strict=False) for t in of.keys() & by.keys()]
    if len(found) != len(expected) or 2 * len(pairs) <= sum(map(len, expected)):
        return float("inf")
    return sum(abs(a - b) for a, b in pairs) / len(pairs)
