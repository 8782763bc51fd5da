"""How likely a policy finds given responses: negative log-likelihoods and perplexity. Never trains, never samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ple_data.common.digests import digests_of
from ple_data.common.models import load_tokenizer, max_positions
from ple_data.evaluation.answers import Answers
from ple_data.evaluation.policies import NamedPolicy
from ple_data.scoring.cache import Score, cached_scores, key_of
from ple_train.log import print_to_log
from ple_train.model.batches import Sequence, micro_batches
from ple_train.model.policy import Policy, load_policy, resolve_precision
from ple_train.sft import read_sequences

BATCH_TOKENS = 8192


def negative_log_likelihoods(
    policy: Policy, sequences: list[Sequence], batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[int, float]]:
    """(place, - sum of the log-probabilities of its response's tokens, in nats) of each sequence, in any order."""
    places = {id(sequence): place for place, sequence in enumerate(sequences)}
    policy.eval()
    for batch in micro_batches(sequences, 1, batch_tokens, 1, 0, layout=policy.layout):
        with torch.no_grad():
            tokens = policy.collate(batch.sequences)
            logps = policy(tokens).double()
        sums = logps.new_zeros(len(batch.sequences)).index_add_(0, tokens.responses, logps)
        yield from zip([places[id(s)] for s in batch.sequences], (-sums).tolist(), strict=True)


def perplexity(
    model: str,
    data: Path,
    *,
    adapter: str | None = None,
    revision: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> float:
    """Perplexity of the responses in a file of (x, y) rows: exp of the mean negative log-probability of a token."""
    sequences = read_sequences(data, load_tokenizer(model, revision, note=print_to_log), max_length=None)
    policy = load_policy(model, adapter=adapter, revision=revision)
    nats = math.fsum(value for _, value in negative_log_likelihoods(policy, sequences, batch_tokens))
    return math.exp(nats / sum(sequence.response for sequence in sequences))


def score_references(
    answers: Answers, references: dict[str, str], output: Path, precision: str, batch_tokens: int = BATCH_TOKENS
) -> dict[str, tuple[float, int]]:
    """By query id: - log pi(reference|x) in nats and the tokens of the reference, its end-of-sequence id counted.

    x is what the policy was asked, token by token; batch_tokens: tokens in memory at once. References that with x
    exceed the policy's positions are left out, and counted on stderr. What was computed before is taken from `output`;
    the policy is loaded for the rest alone.
    """
    policy = answers.policy
    asked = {id: rows[0]["x_ids"] for id, rows in answers.by_query().items() if id in references}
    sequences = _sequences(policy, asked, references)
    positions = max_positions(policy.model, policy.revision)
    kept = {id: s for id, s in sequences.items() if positions is None or len(s.ids) <= positions}
    if len(kept) < len(sequences):
        print_to_log(
            f"{policy.label}: {len(sequences) - len(kept)} references left out of the perplexity: with x they exceed "
            f"the {positions} positions of the model"
        )
    listed = list(kept.values())
    keys = [key_of(s.ids.tolist(), s.prompt) for s in listed]
    precision = resolve_precision(precision)
    loaded: list[Policy] = []

    def compute(places: list[int]) -> Iterator[list[tuple[int, Score]]]:
        if not loaded:
            loaded.append(_load(policy, precision))
        wanted = [listed[place] for place in places]
        for at, nats in negative_log_likelihoods(loaded[0], wanted, batch_tokens):
            yield [(at, (nats, wanted[at].response))]

    scores = cached_scores(
        output / "perplexity",
        f"{digests_of(policy.name)} in {precision}",
        keys,
        compute,
        label=f"perplexity of {policy.label}",
        unit="references",
        names=[f"query {id!r}" for id in kept],
    )
    return {id: (nats, tokens or 0) for id, (nats, tokens) in zip(kept, scores, strict=True)}


def _sequences(policy: NamedPolicy, asked: dict[str, list[int]], references: dict[str, str]) -> dict[str, Sequence]:
    tokenizer: Any = load_tokenizer(policy.model, policy.revision, note=print_to_log)
    if not asked:
        return {}
    texts = tokenizer([references[id] for id in asked], add_special_tokens=False)["input_ids"]
    return {
        id: Sequence(np.array([*x_ids, *ids, tokenizer.eos_token_id], dtype=np.int32), len(x_ids))
        for (id, x_ids), ids in zip(asked.items(), texts, strict=True)
    }


def _load(policy: NamedPolicy, precision: str) -> Policy:
    return load_policy(policy.model, adapter=policy.adapter, revision=policy.revision, precision=precision)
