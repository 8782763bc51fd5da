"""Engine `vllm`: one continuous stream of requests through vLLM, in this process's charge. Never drains.

Further units are pulled whenever fewer requests than twice the engine's concurrency are in flight. A request's seed
makes its tokens nearly reproducible, not to the bit: batching changes the last digits of the logits.
"""

import dataclasses
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from ple_data.common.models import AdapterInfo, load_config
from ple_data.common.watchdog import Watchdog
from ple_data.engines import (
    Completion,
    EngineDiedError,
    EngineSpec,
    Request,
    Sampling,
    cut_at_stop,
    refuse_no_numbers,
    refuse_no_plain_lora,
    refuse_unknown,
    response_text,
)
from schemas.errors import PleError, UsageError

RESERVED = {
    "model": "--model",
    "tokenizer": "--model",
    "revision": "--revision",
    "dtype": "--dtype",
    "enable_lora": "--adapter",
    "load_format": "nothing else: weights are read from safetensors alone",
    "trust_remote_code": "nothing else: code of a model's repository is never run",
    "logprobs_mode": "nothing else: log-probabilities are always those of the model",
}
"""Engine arguments that an option of ours sets."""
CPU_CACHE_BYTES = 4 * 2**30
"""Most memory for keys and values on a CPU where nothing else is asked for; vLLM itself would take most of it."""
CPU_BATCHED_TOKENS = 4096
"""Prompt tokens of one step on a CPU, vLLM's own default; raised where one request needs more."""
ALIVE_SECONDS = 1.0
"""How often it is looked whether the engine's process is there."""
TELL_SECONDS = 1.0
"""How often it is said how many tokens are there."""
WINDOW = 2
"""Requests in flight, as a multiple of those that the engine runs at once."""


def check(engine_args: Mapping[str, Any], adapter: AdapterInfo | None) -> None:
    """Refuse engine arguments that vLLM does not have and adapters it cannot load, before it is started."""
    _set_environment()
    from vllm.config.lora import MaxLoRARanks
    from vllm.engine.arg_utils import EngineArgs

    refuse_unknown(engine_args, [field.name for field in dataclasses.fields(EngineArgs)], "vllm")
    for name, option in RESERVED.items():
        if name in engine_args:
            raise UsageError(f"--engine-arg {name}: use {option}")
    refuse_no_numbers({n: v for n, v in engine_args.items() if v is not None}, {"max_lora_rank": 1, "max_model_len": 1})
    if adapter is None:
        return
    asked = engine_args.get("max_lora_rank")
    limit = asked or max(get_args(MaxLoRARanks))
    if adapter.rank > limit:
        what = "--engine-arg max_lora_rank" if asked else "the vllm engine"
        raise UsageError(
            f"adapter {adapter.path} has rank {adapter.rank}, over the limit of {what}, {limit}; "
            "train one with a lower --lora-rank, or use --engine hf"
        )
    refuse_no_plain_lora(adapter)


class VllmEngine:
    """A vLLM engine of this process. Its worker processes end with it, however this process ends."""

    def __init__(self, spec: EngineSpec, engine_args: Mapping[str, Any]) -> None:
        """Start vLLM (tens of seconds). `engine_args` are fields of vLLM's EngineArgs. Raises PleError."""
        _set_environment()
        self._spec = spec
        self.under_way: Callable[[int], None] = lambda tokens: None
        self._told = 0.0
        _refuse_made_up(spec)
        arguments = _engine_arguments(spec, engine_args)
        self._watchdog = Watchdog()
        self.llm: Any = None
        interrupts: list[int] = []
        try:
            with _stdout_to_stderr(), _interrupts(deferred=False) as interrupts:
                from vllm import LLM
                from vllm.lora.request import LoRARequest

                self.llm = LLM(**arguments)
        except Exception as error:
            self.close()
            if interrupts:
                raise KeyboardInterrupt from error
            _refuse_without_adapters(spec)
            reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
            raise PleError(f"vLLM did not start: {reason.strip()} (its own messages are above)") from error
        except BaseException:
            self.close()
            raise
        self.lora = LoRARequest("policy", 1, str(spec.adapter.path)) if spec.adapter else None
        self._window = WINDOW * self.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        self._names = map(str, itertools.count(1))
        threading.Thread(target=_wake_when_dead, args=(self.llm.llm_engine.engine_core,), daemon=True).start()

    def sample(self, units: Iterator[Sequence[Request]], sampling: Sampling) -> Iterator[tuple[Request, Completion]]:
        """Each request with its completion as it finishes. Raises PleError where the engine dies."""
        in_flight: dict[str, Request] = {}
        more = True
        while True:
            while more and len(in_flight) < self._window:
                unit = next(units, None)
                more = unit is not None
                if not unit:  # there is none, or none yet
                    break
                for request in unit:
                    in_flight[self._add(request, sampling)] = request
            if not in_flight:
                return
            for output in self._step():
                if output.finished:
                    request = in_flight.pop(output.request_id)
                    yield request, self._completion(request, output.outputs[0], sampling)
            self._tell()

    def _tell(self) -> None:
        """Say, now and then, how many tokens the unfinished responses have: vLLM gives each out once it is whole."""
        if (now := time.monotonic()) >= self._told + TELL_SECONDS:
            self._told, processor = now, getattr(self.llm.llm_engine, "output_processor", None)
            states = getattr(processor, "request_states", {}).values()
            self.under_way(sum(state.detokenizer.num_output_tokens() for state in states))

    def close(self) -> None:
        """Shut vLLM down and end every process of it."""
        llm, self.llm = self.llm, None
        try:
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
        finally:
            self._watchdog.stop()

    def sampling_params(self, seed: int, sampling: Sampling) -> Any:
        """vLLM's parameters of one request. All are given, so no default of the model's own slips in."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=seed,
            stop=list(sampling.stop) or None,
            stop_token_ids=list(self._spec.end_ids),
            logprobs=0 if sampling.logprobs else None,
            flat_logprobs=True,
            detokenize=bool(sampling.stop),  # text is decoded once, at the end, from the ids
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _add(self, request: Request, sampling: Sampling) -> str:
        name = next(self._names)
        prompt = {"type": "token", "prompt_token_ids": list(request.prompt_ids)}
        params = self.sampling_params(request.seed, sampling)
        try:
            with _interrupts(deferred=True):
                self.llm.llm_engine.add_request(name, prompt, params, lora_request=self.lora)
        except ValueError as error:
            raise PleError(f"vLLM refuses the request {request.key}: {error}") from error
        return name

    def _step(self) -> list[Any]:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            with _interrupts(deferred=True):
                return self.llm.llm_engine.step()
        except EngineDeadError as error:
            what = "the vLLM engine died (its own messages are above); what was committed is safe"
            raise EngineDiedError(f"{what}: run the same command again") from error

    def _completion(self, request: Request, output: Any, sampling: Sampling) -> Completion:
        if output.finish_reason not in ("stop", "length"):
            raise PleError(f"vLLM ended a response with {output.finish_reason!r}; run the same command again")
        ids = list(output.token_ids)
        logps = list(output.logprobs.logprobs) if sampling.logprobs else None
        text = cut_at_stop(response_text(self._spec, request.prompt_ids, ids), sampling.stop)
        return Completion(ids, text, output.finish_reason, logps)


def _wake_when_dead(core: Any) -> None:
    """Let `step` raise when the engine's process was killed, by a system out of memory say: vLLM 0.32 itself, told of
    it, ends its connection and goes on waiting for answers."""
    from vllm.v1.engine.exceptions import EngineDeadError

    resources, answers = getattr(core, "resources", None), getattr(core, "outputs_queue", None)
    if resources is not None and answers is not None:
        while not resources.engine_dead:
            time.sleep(ALIVE_SECONDS)
        answers.put_nowait(EngineDeadError())


start = VllmEngine


def resolve_machine(dtype: str, engine_args: Mapping[str, Any]) -> tuple[str, str]:
    """Number type and device, in words, that vLLM will sample with. Its own `auto` may be float16: ours never is."""
    import torch
    from vllm.platforms import current_platform

    if dtype == "auto":
        dtype = "bfloat16" if torch.bfloat16 in current_platform.supported_dtypes else "float32"
    return dtype, current_platform.get_device_name() or current_platform.device_type


def _refuse_made_up(spec: EngineSpec) -> None:
    """Raise UsageError where weights of model or adapter are missing: vLLM does not see it where it fuses several into
    one (q, k and v), nor where an adapter lacks a module."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    from ple_data.common.device import META, load_adapter, load_weights

    config = load_config(spec.model, spec.revision)
    if config.model_type in known and not getattr(config, "quantization_config", None):
        what, options = f"the model {spec.model}", {"revision": spec.revision, "config": config}
        model = load_weights(AutoModelForCausalLM, spec.model, META, what, **options)
        if spec.adapter is not None:
            load_adapter(model, spec.adapter.path)


def _refuse_without_adapters(spec: EngineSpec) -> None:
    """Raise UsageError where vLLM has no adapters for such a model: its worker says so, but not to us."""
    from vllm.model_executor.models import ModelRegistry, supports_lora

    for name in (load_config(spec.model, spec.revision).architectures or []) if spec.adapter else []:
        if name in ModelRegistry.models and not supports_lora(ModelRegistry.models[name].load_model_cls()):
            raise UsageError(f"vllm loads no adapter on a {name}, the kind of {spec.model}; use --engine hf")


def _engine_arguments(spec: EngineSpec, engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's arguments: the user's over our defaults."""
    from vllm.config.lora import MaxLoRARanks
    from vllm.platforms import current_platform

    arguments: dict[str, Any] = {
        "model": str(Path(spec.model).resolve()) if Path(spec.model).is_dir() else spec.model,
        "revision": spec.revision,
        "dtype": resolve_machine(spec.dtype, engine_args)[0],
        "max_model_len": spec.max_length,
        "load_format": "safetensors",
        "trust_remote_code": False,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "logprobs_mode": "raw_logprobs",
    }
    if spec.adapter is not None:
        # of the limits that vLLM has, the least that takes the rank
        least = min(limit for limit in get_args(MaxLoRARanks) if limit >= spec.adapter.rank)
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": least}
    if current_platform.is_cpu():
        arguments |= _cpu_arguments(spec, engine_args)
    arguments |= engine_args
    if arguments["max_model_len"] is not None and arguments["max_model_len"] < spec.max_length:
        raise UsageError(
            f"--engine-arg max_model_len={arguments['max_model_len']} is too short: the longest prompt and "
            f"--max-new-tokens need {spec.max_length}"
        )
    return arguments


def _cpu_arguments(spec: EngineSpec, engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults for vLLM on a CPU."""
    # a seeded request whose prompt is split over steps kills the worker there ("CPU Generator does not use offset")
    arguments: dict[str, Any] = {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, spec.max_length),
    }
    memory_is_set = {"kv_cache_memory_bytes", "gpu_memory_utilization"} & set(engine_args)
    if not memory_is_set and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        quarter = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
        arguments["kv_cache_memory_bytes"] = min(CPU_CACHE_BYTES, quarter)
    return arguments


def _set_environment() -> None:
    """vLLM's own switches, where the user has not set them; they must stand before it is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning,ignore::FutureWarning")
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # forked workers would hold our pipes and locks


@contextmanager
def _interrupts(*, deferred: bool) -> Iterator[list[int]]:
    """Note Ctrl-C and SIGTERM as they come: inside vLLM a KeyboardInterrupt can turn into another error.

    It is raised at once or, `deferred`, at the end of the block. Only the main thread has signals.
    """
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        if not deferred:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)
        if deferred and noted:
            raise KeyboardInterrupt


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Processes started meanwhile write to stderr: stdout is for data."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)
