"""How far each policy has gone from the first: log-probabilities of its own responses, under itself and the first.

They say something of a policy's distribution only where it was sampled as it is (`evaluation.answers.AS_IS`). Never
samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as ListLike
from typing import Any

import numpy as np

from ple_data.common.models import load_config, load_tokenizer, positions_of, vocabulary_of
from ple_data.evaluation.answers import Answers
from ple_data.evaluation.policies import NamedPolicy
from ple_train.measure.perplexity import Likelihoods
from ple_train.model.batches import Sequence
from schemas.errors import UsageError

Row = dict[str, Any]


def score_responses(answers: ListLike[Answers], at: int, likelihoods: Likelihoods) -> list[str]:
    """Set `own_logps` in the rows of the policy `at`, whose likelihoods are given: log pi(y|x) in nats, x as it was
    asked. Those of the first policy set `first_logps` in the rows of all.

    Gives a sentence on what could not be computed, if there is one; each is given once.
    """
    if otherwise := ", ".join(each.policy.label for each in answers if not each.as_is):
        how = "to be drawn at --temperature 1, without --top-p, --top-k, --min-p and --repetition-penalty"
        return [] if at else [f"No KL and no entropy: responses of {otherwise} are not known {how}"]
    own, others, said = answers[at].rows, [] if at else answers[1:], []
    if strangers := ", ".join(each.policy.label for each in others if not _reads(answers[0].policy, each)):
        others, said = [], [f"No KL: {answers[0].policy.label} has other tokens, or fewer positions, than {strangers}"]
    rows = [*own, *(row for each in others for row in each.rows)]
    names = [f"query {row['query_id']!r} sample {row['sample']}" for row in rows]
    try:
        scores = likelihoods.of([_sequence(row) for row in rows], "logps", "responses", names)
    except UsageError as error:
        return [f"No KL and no entropy: {error}"]
    for row, (nats, _) in zip(rows, scores, strict=True):
        if not at and not said:
            row["first_logps"] = -nats
    for row, (nats, _) in zip(own, scores, strict=False):
        row["own_logps"] = -nats
    return said


def _sequence(row: Row) -> Sequence:
    x = row["x_ids"]
    return Sequence(np.concatenate([x, row["y_ids"]]).astype(np.int32), len(x), query=tuple(x))


def _reads(policy: NamedPolicy, answers: Answers) -> bool:
    """Whether the tokens of the answers mean the same to the policy, and are not more than it takes."""
    other, config = answers.policy, load_config(policy.model, policy.revision)
    texts = [_sequence(row).ids for row in answers.rows]
    highest, longest = max(int(ids.max(initial=0)) for ids in texts), max(map(len, texts))
    if highest >= (vocabulary_of(config) or math.inf) or longest > (positions_of(config) or math.inf):
        return False
    if (policy.model, policy.revision) == (other.model, other.revision):
        return True
    own, others = (load_tokenizer(p.model, p.revision, note=lambda _: None).get_vocab() for p in (policy, other))
    return bool(own == others)
