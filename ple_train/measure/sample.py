"""One response to each query, in memory: what recipes measure. `ple eval` keeps its own in stores.

It never trains and never writes a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import numpy as np

from ple_train.log import print_to_log

BATCH = 64


def sample_responses(
    model: str,
    queries: Sequence[str],
    *,
    adapter: str | None = None,
    engine: str | None = None,
    max_new_tokens: int = 1024,
    seed: int = 0,
) -> list[str]:
    """One response to each query, in order, given x alone.

    A query's response depends on the seed and its place in the list, so that two policies are compared draw by draw.
    """
    from ple_data.common.models import check_adapter, check_model, end_ids, load_tokenizer
    from ple_data.engines import EngineSpec, Request, Sampling, choose_engine, make_engine
    from ple_data.inputs.principles import render
    from ple_data.inputs.templates import response_form

    check_model(model)
    tokenizer = load_tokenizer(model, note=print_to_log)
    seeds = [int(np.random.SeedSequence([seed, index]).generate_state(1)[0]) for index in range(len(queries))]
    requests = [Request(at, tuple(render(tokenizer, x)), seeds[at]) for at, x in enumerate(queries)]
    longest = max(len(request.prompt_ids) for request in requests) + max_new_tokens
    info = check_adapter(adapter, model) if adapter else None
    ends = (*end_ids(model, tokenizer), response_form(tokenizer).end)
    spec = EngineSpec(model, None, info, tokenizer, ends, longest)
    sampling = Sampling(max_new_tokens=max_new_tokens, logprobs=False)
    with closing(make_engine(choose_engine(engine), spec, {})) as sampler:
        units = (requests[first : first + BATCH] for first in range(0, len(requests), BATCH))
        texts = {request.key: completion.text for request, completion in sampler.sample(units, sampling)}
    return [texts[index] for index in range(len(queries))]
