"""Section e: tokens a second of our engines on a model of Qwen2.5-0.5B's shape, and what seeds cost.

The seeded noise of the engine hf is what it draws to sample rather than to take the likeliest token; of vLLM its own
interface is timed too, with and without a seed on every request. Says nothing of how good the tokens are.
"""

import importlib.util
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import train
from benchmarks.on_gpu.sections import NotHere, Results, Setting, room_for
from benchmarks.on_gpu.timing import need_gpu, on_gpu, wait
from benchmarks.side_by_side import clear_memory, most_memory

BATCHES, PROMPT, RESPONSE = (64, 256, 16), 128, 128
SMALL_BATCHES, SMALL_LENGTH = (2, 8), 8
NEW_LENGTHS = 48
VLLM_REQUESTS, VLLM_RESPONSE = 512, 256
VLLM_SECONDS = 30
"""What vLLM needs to start; with less left it is not tried."""


def measure(results: Results, setting: Setting) -> None:
    with room_for(1 if setting.cpu else 4) as folder:
        model = folder / "model"
        shape = train.SHAPES["small" if setting.cpu else "qwen2.5-0.5b"]
        if setting.cpu:
            shape = shape | {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 1}
        train.write_model(model, shape, torch.bfloat16 if on_gpu() else torch.float32)
        clear_memory()
        engine = start("hf", model, {})
        for cudnn in (True, False):
            name = f"hf, new lengths, {'with' if cudnn else 'without'} cuDNN's attention"
            results.attempt(name, partial(new_lengths, engine, cudnn, shape["vocab_size"], setting.cpu))
        for batch in SMALL_BATCHES if setting.cpu else BATCHES:
            results.attempt(f"hf, {batch} at once", partial(hf, engine, batch, shape["vocab_size"], setting.cpu))
        engine.close()
        clear_memory()
        for seeded in (True, False):
            name = f"vllm, {'a seed on every request' if seeded else 'no seeds'}"
            results.attempt(name, partial(vllm, model, seeded, shape["vocab_size"], setting))


def start(name: str, model: Path, arguments: dict[str, Any]) -> Any:
    """An engine as `ple-gen` makes it, batches as large as they are given."""
    from ple_data.common.models import end_ids, load_tokenizer
    from ple_data.engines import EngineSpec, make_engine

    tokenizer = load_tokenizer(str(model), None)
    spec = EngineSpec(str(model), None, None, tokenizer, end_ids(str(model), tokenizer, None), PROMPT + RESPONSE)
    more = {"batch_size": max(BATCHES)} if name == "hf" else {}
    return make_engine(name, spec, more | arguments)


def hf(engine: Any, batch: int, vocabulary: int, small: bool) -> dict[str, Any]:
    """Sampled, and without noise; the share of the time that the noise and its bookkeeping take is their difference."""
    from ple_data.engines import Sampling

    prompt, response = (SMALL_LENGTH, SMALL_LENGTH) if small else (PROMPT, RESPONSE)
    requests = requests_of(batch, prompt, vocabulary)
    clear_memory()
    seconds, tokens = {}, {}
    for name, temperature in {"warm up": 1.0, "sampled": 1.0, "greedy": 0.0}.items():
        length = response if name != "warm up" else 4
        sampling = Sampling(max_new_tokens=length, temperature=temperature)
        wait()
        began = time.perf_counter()
        tokens[name] = sum(len(completion.ids) for _, completion in engine.sample(iter([requests]), sampling))
        seconds[name] = time.perf_counter() - began
    return {
        "tokens_per_second": tokens["sampled"] / seconds["sampled"],
        "greedy_tokens_per_second": tokens["greedy"] / seconds["greedy"],
        "share_of_noise": 1 - seconds["greedy"] / tokens["greedy"] * tokens["sampled"] / seconds["sampled"],
        "ms_a_token_of_a_row": 1000 * seconds["sampled"] / response,
        "peak_gib": most_memory() / 2**30,
    }


def new_lengths(engine: Any, cudnn: bool, vocabulary: int, small: bool) -> dict[str, Any]:
    """The same batch twice: the first time every step's length is a new one, for which cuDNN makes a plan."""
    from ple_data.engines import Sampling

    need_gpu()
    length = SMALL_LENGTH if small else NEW_LENGTHS
    requests = requests_of(BATCHES[0], length, vocabulary)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    seconds = []
    try:
        for _ in range(2):
            wait()
            began = time.perf_counter()
            list(engine.sample(iter([requests]), Sampling(max_new_tokens=length)))
            seconds.append(time.perf_counter() - began)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    first, second = (1000 * each / length for each in seconds)
    return {"ms_a_step": first, "ms_a_step_seen_before": second, "was_on": before}


def requests_of(count: int, prompt: int, vocabulary: int) -> list[Any]:
    from ple_data.engines import Request

    numbers = np.random.default_rng(0)
    return [Request(at, tuple(numbers.integers(2, vocabulary, prompt).tolist()), seed=at) for at in range(count)]


def vllm(model: Path, seeded: bool, vocabulary: int, setting: Setting) -> dict[str, Any]:
    """vLLM's own interface, as our engine asks it: token ids, the log-probability of each sampled token."""
    if not importlib.util.find_spec("vllm"):
        raise NotHere("vllm is not installed")
    if setting.seconds_left() < VLLM_SECONDS and not setting.cpu:
        raise NotHere("no time left")
    from vllm import SamplingParams, TokensPrompt

    engine = start("vllm", model, {} if setting.cpu else {"gpu_memory_utilization": 0.8})
    count, length = (4, 8) if setting.cpu else (VLLM_REQUESTS, VLLM_RESPONSE)
    requests = requests_of(count, 16 if setting.cpu else PROMPT, vocabulary)
    prompts = [TokensPrompt(prompt_token_ids=list(request.prompt_ids)) for request in requests]

    def generate(length: int) -> tuple[int, float]:
        each = [
            SamplingParams(
                max_tokens=length, seed=request.seed if seeded else None, ignore_eos=True, logprobs=0, detokenize=False
            )
            for request in requests
        ]
        began = time.perf_counter()
        outputs = engine.llm.generate(prompts, each, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs), time.perf_counter() - began

    try:
        generate(4)
        tokens, seconds = generate(length)
    finally:
        engine.close()
    return {"requests": count, "tokens_per_second": tokens / seconds}
