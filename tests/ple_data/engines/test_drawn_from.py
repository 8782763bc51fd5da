"""What tokens are drawn from under all of a round's options: against plain floats, and against vLLM's own sampler."""

import json
import math
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ple_data.engines import Request, Sampling
from ple_data.engines.hf import HfEngine, drawn_from, penalized
from tests.conftest import ROOT
from tests.ple_data.engines.test_engines import requests_for, sample, spec_of, true_logits

WIDTH = 40
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 100},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_p": 0.8, "top_k": 7},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5, "temperature": 1.4, "min_p": 0.02},
    {"repetition_penalty": 1.3, "temperature": 0.7, "min_p": 0.05, "top_k": 9, "top_p": 0.7},
    {"temperature": 2.5, "min_p": 0.3, "top_p": 0.5},
]


def cases() -> list[dict[str, Any]]:
    """A row of logits for each set of options, with the ids of a prompt and of what was sampled so far."""
    draw = random.Random(3)
    return [
        {
            "options": options,
            "logits": [draw.gauss(0, 3) for _ in range(WIDTH)],
            "prompt": [draw.randrange(WIDTH) for _ in range(4)],
            "sampled": [draw.randrange(WIDTH) for _ in range(3)],
        }
        for options in OPTIONS
    ]


def ours(case: dict[str, Any]) -> list[float]:
    seen = torch.zeros(1, WIDTH, dtype=torch.bool)
    seen[0, [*case["prompt"], *case["sampled"]]] = True
    return drawn_from(torch.tensor([case["logits"]]), Sampling(**case["options"]), seen)[0].softmax(-1).tolist()


def by_hand(case: dict[str, Any]) -> list[float]:
    """Probabilities in plain floats: penalty, temperature, min-p, top-k, top-p, each of what is left."""
    how = Sampling(**case["options"])
    logits = list(map(float, case["logits"]))
    for token in {*case["prompt"], *case["sampled"]}:
        logits[token] *= how.repetition_penalty if logits[token] <= 0 else 1 / how.repetition_penalty
    left = {token: math.exp(value / how.temperature) for token, value in enumerate(logits)}
    left = {token: weight for token, weight in left.items() if weight >= how.min_p * max(left.values())}
    order = sorted(left, key=left.__getitem__, reverse=True)[: how.top_k or None]
    total, kept, share = sum(left[token] for token in order), [], 0.0
    for token in order:
        if share >= how.top_p:
            break
        kept.append(token)
        share += left[token] / total
    total = sum(left[token] for token in kept)
    return [left[token] / total if token in kept else 0.0 for token in range(WIDTH)]


@pytest.mark.parametrize("case", cases(), ids=lambda case: str(case["options"]))
def test_tokens_are_drawn_from_what_is_left(case: dict[str, Any]) -> None:
    expected, found = by_hand(case), ours(case)
    assert [p > 0 for p in found] == [p > 0 for p in expected]
    assert found == pytest.approx(expected, rel=1e-5)


VLLM = """
import json, sys
from types import SimpleNamespace
import torch
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor
from vllm.v1.sample.logits_processor.interface import BatchUpdate
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

found = []
for case in json.load(sys.stdin):
    how = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0} | case["options"]
    logits = torch.tensor([case["logits"]])
    width = logits.shape[1]
    min_p = MinPLogitsProcessor(SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=1)), "cpu", False)
    min_p.update_state(BatchUpdate(1, (), [(0, SimpleNamespace(min_p=how["min_p"]), None, [])], ()))
    one = lambda value: torch.tensor([value], dtype=torch.float32)
    metadata = SamplingMetadata(
        temperature=one(how["temperature"]), all_greedy=False, all_random=True,
        top_p=one(how["top_p"]) if how["top_p"] < 1 else None,
        top_k=torch.tensor([how["top_k"]]) if 0 < how["top_k"] < width else None,
        generators={0: torch.Generator().manual_seed(1)}, max_num_logprobs=-1, no_penalties=False,
        prompt_token_ids=torch.tensor([case["prompt"]]), frequency_penalties=one(0.0), presence_penalties=one(0.0),
        repetition_penalties=one(how["repetition_penalty"]), output_token_ids=[case["sampled"]],
        allowed_token_ids_mask=None, bad_words_token_ids={}, logitsprocs=LogitsProcessors([min_p]),
    )
    output = Sampler("processed_logprobs")(logits, metadata)
    found.append(output.logprobs_tensors.logprobs[0].exp().tolist())
print(json.dumps(found))
"""


@pytest.mark.vllm
@pytest.mark.long
def test_the_distribution_is_that_of_vllms_sampler(vllm_python: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [vllm_python, "-c", VLLM], input=json.dumps(cases()), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    for case, expected in zip(cases(), theirs, strict=True):
        found = ours(case)
        assert [p > 0 for p in found] == [p > 0 for p in expected], case["options"]
        assert found == pytest.approx(expected, rel=1e-5), case["options"]


def test_a_penalty_is_on_prompt_and_response_and_not_on_what_pads(policy: Path) -> None:
    """Greedy, rows of many lengths in one batch: the pad id would be penalized in all but the longest."""
    engine = HfEngine(spec_of(policy), {"batch_size": 8})
    requests = [Request(r.key, r.prompt_ids[: 2 + 3 * r.key], r.seed) for r in requests_for(policy)[:8]]
    found = sample(engine, [requests], temperature=0.0, repetition_penalty=3.0)
    model, plain = AutoModelForCausalLM.from_pretrained(policy).eval(), sample(engine, [requests], temperature=0.0)
    for request in requests:
        ids = found[request.key].ids
        for at, logits in enumerate(true_logits(model, request.prompt_ids, ids)):
            seen = torch.zeros(1, len(logits), dtype=torch.bool)
            seen[0, [*request.prompt_ids, *ids[:at]]] = True
            assert penalized(logits[None], 3.0, seen).argmax().item() == ids[at]
    assert any(found[r.key].ids != plain[r.key].ids for r in requests)


def test_options_out_of_range_are_refused() -> None:
    from schemas.errors import UsageError

    for wrong in ({"top_k": -1}, {"min_p": 1.5}, {"repetition_penalty": 0}, {"repetition_penalty": math.nan}):
        with pytest.raises(UsageError, match="must be"):
            Sampling(**wrong)
