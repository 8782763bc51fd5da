"""Runs in the environment with vLLM: one engine start, many questions. Reads a JSON job, prints JSON answers.

`python -m tests.vllm_probe JOB.json`: {"model", "prompts", "stop"} -> completions of each way of sampling, and the
messages of arguments that must be refused.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from ple_data.common.models import AdapterInfo, end_ids, load_tokenizer
from ple_data.engines import EngineSpec, Request, Sampling, vllm
from schemas.errors import UsageError

LENGTH = 24


def refused(engine_args: dict[str, Any], adapter: AdapterInfo | None = None) -> str:
    """The message with which arguments are refused."""
    try:
        vllm.check(engine_args, adapter)
    except UsageError as error:
        return str(error)
    return "not refused"


def refused_without_adapters(spec: EngineSpec) -> str:
    try:
        vllm._refuse_without_adapters(spec)
    except UsageError as error:
        return str(error)
    return "not refused"


@contextmanager
def card_of(dtypes: list[torch.dtype]) -> Iterator[None]:
    """The platform says that it computes in these number types alone, as vLLM's does for a Turing card."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    with patch.object(platform, "supported_dtypes", dtypes):
        yield


def main(job: dict[str, Any]) -> dict[str, Any]:
    """All answers."""
    tokenizer = load_tokenizer(job["model"])
    longest = max(map(len, job["prompts"]))
    spec = EngineSpec(
        job["model"], None, None, tokenizer, end_ids(job["model"], tokenizer), longest + LENGTH, dtype="float32"
    )
    answers: dict[str, Any] = {
        "unknown": refused({"tensor_paralel_size": 2}),
        "reserved": refused({"model": "other"}),
        "pickles": refused({"load_format": "pt"}),
        "rank over our limit": refused({"max_lora_rank": 8}, AdapterInfo(Path("a"), 16, {})),
        "rank over vllm's limit": refused({}, AdapterInfo(Path("a"), 4096, {})),
        "dora": refused({}, AdapterInfo(Path("a"), 8, {"use_dora": True})),
    }
    answers["machine"] = vllm.resolve_machine("auto", {})
    for name in ("GPT2LMHeadModel", "LlamaForCausalLM"):
        with patch.object(vllm, "load_config", lambda *_, name=name: SimpleNamespace(architectures=[name])):
            answers[name] = refused_without_adapters(replace(spec, adapter=AdapterInfo(Path("a"), 8, {})))
    with card_of([torch.float16, torch.float32]):
        answers["on an older card"] = vllm.resolve_machine("auto", {})[0]
    try:
        vllm.VllmEngine(spec, {"max_model_len": longest})
    except UsageError as error:
        answers["too short"] = str(error)
    requests = [Request(at, tuple(ids), 1000 + at) for at, ids in enumerate(job["prompts"])]
    engine = vllm.VllmEngine(spec, {"enforce_eager": True})

    def sample(units: list[list[Request]], **options: Any) -> list[dict[str, Any]]:
        sampling = Sampling(max_new_tokens=LENGTH, **options)
        found = {request.key: asdict(completion) for request, completion in engine.sample(iter(units), sampling)}
        return [found[key] for key in range(len(requests))]

    answers["sampled"] = sample([requests])
    told: list[int] = []
    engine.under_way = told.append
    with patch.object(vllm, "TELL_SECONDS", 0.0):
        answers["told of"] = sample([requests])
    answers["told"] = told.copy()
    answers["other batches"] = sample([[request] for request in reversed(requests)])
    answers["greedy"] = sample([requests], temperature=0.0)
    answers["stop"] = sample([requests], stop=tuple(job["stop"]))
    answers["no logps"] = sample([requests], logprobs=False)
    answers["top_k"], answers["min_p"] = sample([requests], top_k=1), sample([requests], min_p=1.0)
    answers["penalized"] = sample([requests], temperature=0.0, repetition_penalty=3.0)
    answers["cold"] = sample([requests], temperature=0.3, top_p=0.5)
    engine.close()
    engine.close()
    return answers


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
