"""One response to each query, in memory: what `ple demo` and the recipes measure. `ple eval` keeps its own in stores.

It never trains and never writes a file.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ple_train.log import print_to_log

BATCH = 64


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
    from ple_data.common.models import check_adapter, check_model, end_ids, load_tokenizer
    from ple_data.engines import EngineSpec, Request, Sampling, choose_engine, make_engine
    from ple_data.inputs.principles import load_principle, render

    check_model(model)
    tokenizer = load_tokenizer(model, revision, note=print_to_log)
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
