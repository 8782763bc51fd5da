"""Engines: token ids in, sampled token ids out, behind one small protocol. Knows nothing of queries or files.

An engine takes units (a unit is a sequence of requests that will be stored together) and yields each request with
its completion as soon as that is finished, in any order. It pulls the next unit when it has room for more.
"""

import difflib
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from ple_data.extras import missing
from ple_data.models import AdapterInfo
from schemas.errors import UsageError

Finish = Literal["stop", "length"]
ENGINES = ("vllm", "hf")


@dataclass(frozen=True, slots=True)
class Request:
    """One response to sample. `key` is the caller's; `seed` alone decides the random numbers."""

    key: Any
    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled. temperature 0 is greedy; `logprobs` keeps the log-probability of each token."""

    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    logprobs: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"--temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p must be above 0 and at most 1, not {self.top_p}")
        if "" in self.stop:
            raise UsageError("--stop must not be an empty text")


@dataclass(frozen=True, slots=True)
class Completion:
    """A sampled response.

    ids: the sampled token ids. One that stopped ends with its end token (or with the token that completed a stop
    string); one cut by length has no end token. text: ids without special tokens, cut before a stop string.
    logps: the model's log-probability of each id, before temperature and top-p; None where not asked for.
    """

    ids: list[int]
    text: str
    finish: Finish
    logps: list[float] | None


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is made from, checked before: model, tokenizer, end token ids, longest sequence needed.

    dtype: a number type, or `auto` for what `resolve_machine` chooses.
    """

    model: str
    revision: str | None
    adapter: AdapterInfo | None
    tokenizer: Any
    end_ids: tuple[int, ...]
    max_length: int
    dtype: str = "auto"


class Engine(Protocol):
    """Samples responses. `close` frees the device and ends every process of the engine; it may be called twice."""

    def sample(self, units: Iterator[Sequence[Request]], sampling: Sampling) -> Iterator[tuple[Request, Completion]]:
        """Yield every request of every unit with its completion, in any order."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


def choose_engine(name: str | None) -> str:
    """`name` checked, or the default: vllm where it can be imported, else hf. Raises UsageError."""
    has_vllm = importlib.util.find_spec("vllm") is not None
    if name is None:
        return "vllm" if has_vllm else "hf"
    if name not in ENGINES:
        raise UsageError(f"--engine must be one of {', '.join(ENGINES)}, not {name}")
    if name == "vllm" and not has_vllm:
        raise missing("vllm", "--engine hf works as it is; --engine vllm needs the package")
    return name


def check_engine_args(name: str, engine_args: Mapping[str, Any], adapter: AdapterInfo | None) -> None:
    """Refuse unknown engine arguments and adapters that the engine cannot load, before anything is started."""
    if name == "vllm":
        from ple_data.engines import vllm

        vllm.check(engine_args, adapter)
    else:
        from ple_data.engines import hf

        refuse_unknown(engine_args, hf.ENGINE_ARGS, name)


def resolve_machine(name: str, dtype: str, engine_args: Mapping[str, Any]) -> tuple[str, str]:
    """Number type and device, in words, that an engine will sample with.

    `auto` is bfloat16 where the device computes in it, else float32; never float16, which nobody would notice.
    Raises UsageError for a number type that there is not.
    """
    if name == "vllm":
        from ple_data.engines import vllm

        return vllm.resolve_machine(dtype)
    from ple_data.engines import hf

    return hf.resolve_machine(dtype, engine_args)


def make_engine(name: str, spec: EngineSpec, engine_args: Mapping[str, Any]) -> Engine:
    """Start an engine. Raises PleError where it does not start."""
    if name == "vllm":
        from ple_data.engines.vllm import VllmEngine

        return VllmEngine(spec, engine_args)
    from ple_data.engines.hf import HfEngine

    return HfEngine(spec, engine_args)


def parse_engine_args(texts: Iterable[str]) -> dict[str, Any]:
    """`name=value` texts as a dictionary; a value is JSON where it can be read as such (also True, False, None)."""
    words = {"True": True, "False": False, "None": None}
    arguments: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise UsageError(f"--engine-arg {text!r} must be name=value")
        try:
            arguments[name.replace("-", "_")] = words[value] if value in words else json.loads(value)
        except ValueError:
            arguments[name.replace("-", "_")] = value
    return arguments


def refuse_unknown(engine_args: Mapping[str, Any], known: Iterable[str], engine: str) -> None:
    """Raise UsageError for the first argument the engine does not know, with the nearest name that it knows."""
    known = list(known)
    for name in engine_args:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known)[:20])}"
            raise UsageError(f"--engine-arg {name}: the {engine} engine has no such argument; {hint}")


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string in it, or all of it."""
    ends = [at for at in (text.find(word) for word in stop) if at >= 0]
    return text[: min(ends)] if ends else text


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of sampled ids, without special tokens and without any tidying of spaces."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def local_path(model: str) -> str:
    """An absolute path for a directory, a hub id as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model
