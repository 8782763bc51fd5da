"""How likely a policy finds given responses: negative log-likelihoods and perplexity. Never trains, never samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ple_data.common.digests import digests_of
from ple_data.common.models import load_config, load_tokenizer, positions_of, refuse_unknown, vocabulary_of
from ple_data.common.tokens import ids_after
from ple_data.evaluation.answers import Answers
from ple_data.evaluation.policies import NamedPolicy
from ple_data.inputs.templates import response_form
from ple_data.scoring.cache import Score, cached_scores, key_of
from ple_train.log import print_to_log
from ple_train.model.batches import Sequence, micro_batches
from ple_train.model.policy import Policy, load_policy
from ple_train.sft import read_sequences

BATCH_TOKENS = 8192


def negative_log_likelihoods(
    policy: Policy, sequences: list[Sequence], batch_tokens: int = BATCH_TOKENS
) -> Iterator[list[tuple[int, float]]]:
    """(place, - sum of the log-probabilities of its response's tokens, in nats) of each sequence, in any order, a batch
    at a time.
    """
    places = {id(sequence): place for place, sequence in enumerate(sequences)}
    policy.eval()
    for batch in micro_batches(sequences, 1, batch_tokens, 1, 0, layout=policy.layout):
        with torch.no_grad():
            tokens = policy.collate(batch.sequences)
            logps = policy(tokens).double()
        sums = logps.new_zeros(len(batch.sequences)).index_add_(0, tokens.responses, logps)
        yield list(zip([places[id(s)] for s in batch.sequences], (-sums).tolist(), strict=True))


def perplexity(model: str, data: Path, *, adapter: str | None = None) -> float:
    """Perplexity of the responses in a file of (x, y) rows: exp of the mean negative log-probability of a token."""
    sequences = read_sequences(data, load_tokenizer(model, note=print_to_log), max_length=None)
    policy = load_policy(model, adapter=adapter)
    refuse_unknown((sequence.ids for sequence in sequences), policy.vocabulary, model)
    nats = math.fsum(value for batch in negative_log_likelihoods(policy, sequences) for _, value in batch)
    return math.exp(nats / sum(sequence.response for sequence in sequences))


@dataclass
class Likelihoods:
    """How likely one policy finds sequences, each computed once and kept below `output`.

    precision: float32 or bf16. batch_tokens: tokens in memory at once. The policy is loaded when something is to be
    computed, once.
    """

    policy: NamedPolicy
    output: Path
    precision: str
    batch_tokens: int

    @cached_property
    def loaded(self) -> Policy:
        """The model in memory. Raises UsageError where it cannot be loaded."""
        named = self.policy
        return load_policy(named.model, adapter=named.adapter, revision=named.revision, precision=self.precision)

    def of(self, sequences: list[Sequence], folder: str, unit: str, names: ListLike[str]) -> list[Score]:
        """- log pi(response|prompt) in nats and the response's tokens, of each sequence.

        folder: where below `output` they are kept; unit: what they are; names: what messages call each. Raises
        UsageError for a token that the model has no row for, or a model that cannot be loaded.
        """
        policy = self.policy
        vocabulary = vocabulary_of(load_config(policy.model, policy.revision))
        refuse_unknown((sequence.ids for sequence in sequences), vocabulary, policy.model)

        def compute(places: list[int]) -> Iterator[list[tuple[int, Score]]]:
            wanted = [sequences[place] for place in places]
            for batch in negative_log_likelihoods(self.loaded, wanted, self.batch_tokens):
                yield [(at, (nats, wanted[at].response)) for at, nats in batch]

        return cached_scores(
            self.output / folder,
            f"{digests_of(policy.name)} in {self.precision}",
            [key_of(s.ids.tolist(), s.prompt) for s in sequences],
            compute,
            label=f"{folder} of {policy.label}",
            unit=unit,
            names=names,
        )


def score_references(answers: Answers, references: dict[str, str], likelihoods: Likelihoods) -> None:
    """Set `reference` in every row, by query id, and how likely it is: `reference_nll`, - log pi(reference|x) in nats,
    and `reference_tokens`, the id that ends it counted; all None where there is none.

    x is what the policy was asked, token by token. References that with x exceed the policy's positions are left out,
    and counted on stderr.
    """
    policy = answers.policy
    tokenizer: Any = load_tokenizer(policy.model, policy.revision, note=print_to_log)
    asked = {id: rows[0]["x_ids"] for id, rows in answers.by_query().items() if id in references}
    texts = [references[id] for id in asked]
    form = response_form(tokenizer, "chat" if answers.chat else "plain")
    ys = ids_after(tokenizer, list(asked.values()), texts, form.lead)
    positions = positions_of(load_config(policy.model, policy.revision)) or math.inf
    sequences = {
        id: Sequence(np.array([*x, *y, form.end], dtype=np.int32), len(x))
        for (id, x), y in zip(asked.items(), ys, strict=True)
        if len(x) + len(y) < positions
    }
    if len(sequences) < len(asked):
        print_to_log(
            f"{policy.label}: {len(asked) - len(sequences)} references left out of the perplexity: with x they exceed "
            f"the {positions} positions of the model"
        )
    names = [f"query {id!r}" for id in sequences]
    scores = likelihoods.of(list(sequences.values()), "perplexity", "references", names)
    found = dict(zip(sequences, scores, strict=True))
    for row in answers.rows:
        row["reference"] = references.get(row["query_id"])
        row["reference_nll"], row["reference_tokens"] = found.get(row["query_id"], (None, None))
