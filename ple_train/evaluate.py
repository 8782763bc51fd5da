"""Measures a policy: responses to queries, means with a bootstrap interval, perplexity on reference rows.

It never trains and never writes a file.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BATCH = 64


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def bootstrap_mean(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The mean of `values` and its percentile bootstrap interval (Efron 1979)."""
    sample = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = [generator.choice(sample, len(sample)).mean() for _ in range(resamples)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(sample.mean()), float(low), float(high), len(sample))


def sample_responses(
    model: str,
    queries: Sequence[str],
    *,
    adapter: str | None = None,
    revision: str | None = None,
    principle: str | None = None,
    engine: str | None = None,
    max_new_tokens: int = 1024,
    seed: int = 0,
) -> list[str]:
    """One response to each query, in order, given x alone or [p, x] with a principle's name or file.

    A query's response depends on the seed and its place in the list, so that two policies are compared draw by draw.
    """
    from ple_data.engines import EngineSpec, Request, Sampling, choose_engine, make_engine
    from ple_data.models import check_adapter, check_model, end_ids, load_tokenizer
    from ple_data.principles import load_principle, render

    check_model(model)
    tokenizer = load_tokenizer(model, revision, note=_log)
    guide = load_principle(principle) if principle else None
    requests = [
        Request(
            index,
            tuple(render(tokenizer, x, guide)),
            int(np.random.SeedSequence([seed, index]).generate_state(1)[0]),
        )
        for index, x in enumerate(queries)
    ]
    units = [requests[first : first + BATCH] for first in range(0, len(requests), BATCH)]
    longest = max(len(request.prompt_ids) for request in requests)
    spec = EngineSpec(
        model,
        revision,
        check_adapter(adapter, model) if adapter else None,
        tokenizer,
        end_ids(model, tokenizer, revision),
        longest + max_new_tokens,
    )
    sampler = make_engine(choose_engine(engine), spec, {})
    try:
        sampling = Sampling(max_new_tokens=max_new_tokens, logprobs=False)
        texts = {request.key: completion.text for request, completion in sampler.sample(iter(units), sampling)}
    finally:
        sampler.close()
    return [texts[index] for index in range(len(queries))]


def perplexity(
    model: str,
    data: Path,
    *,
    adapter: str | None = None,
    revision: str | None = None,
    batch_tokens: int = 8192,
) -> float:
    """Perplexity of the responses in a file of (x, y) rows: exp of the mean negative log-probability of a token."""
    import torch

    from ple_data.models import load_tokenizer
    from ple_train.batches import micro_batches
    from ple_train.policy import load_policy
    from ple_train.sft import read_sequences

    sequences = read_sequences(data, load_tokenizer(model, revision, note=_log), max_length=None)
    policy = load_policy(model, adapter=adapter, revision=revision).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in micro_batches(sequences, 1, batch_tokens, 1, 0):
            logps = policy(policy.collate(batch.sequences, policy.device))
            total += logps.double().sum().item()
            count += logps.numel()
    return math.exp(-total / count)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
