"""`ple eval`: several policies on the same queries, in rewards, perplexity, BLEU, length and distinct words.

Answers, rewards and likelihoods are kept in the output directory as they come, so that a rerun computes what is
missing and no more. Every number has a 95 % interval over queries. Never trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ple_data.evaluation.answers import Answers, asked_settings, sample_answers, stored_answers
from ple_data.evaluation.metrics import Mean, Metric, Perplexity, bleu, distinct
from ple_data.evaluation.policies import parse_policies
from ple_data.evaluation.references import References, load_references, references_beside, refuse_strangers
from ple_data.evaluation.rewards import check_reward_models, score_answers
from ple_data.judge.sources import named, same_query
from ple_data.storage.parquet import save_rows
from ple_train.log import print_to_log
from ple_train.measure.perplexity import score_references
from ple_train.model.policy import resolve_precision
from schemas.errors import UsageError
from schemas.files import write_atomic
from schemas.options import Evaluate, Rewards
from schemas.reports import Comparison, EvalReport, PolicyResult, RewardModelUse

RESULT, TABLE = "eval.json", "eval.parquet"


@dataclass(frozen=True)
class _Measured:
    """One policy's answers to the queries that all policies answered, their references and its likelihoods of them."""

    answers: Answers
    references: References
    likelihoods: dict[str, tuple[float, int]]


def evaluate(options: Evaluate) -> EvalReport:
    """Measure each policy (`NAME=MODEL[,ADAPTER]`) and its difference from the first; write eval.json and eval.parquet.

    Answers are sampled to `queries`, or are the rows of each policy in the stores `data`. Raises UsageError for
    anything wrong with the input, before anything is sampled.
    """
    data, source, output, seed = options.data, options.queries, options.output, options.seed
    if (source is None) == (not data):
        raise UsageError("give either --queries, to sample responses, or --data, to take those of a store")
    if options.round is not None and not data:
        raise UsageError("--round is for --data; responses to --queries have no round")
    policies = parse_policies(options.policy)
    check_reward_models(options)
    where = options.references
    given = load_references(where, source, options) if where is not None else None
    if source is not None:
        answers = sample_answers(policies, output, source, options)
    else:
        answers = stored_answers(policies, data, options.round)
    answers = _comparable(answers)
    if where is not None and given is not None:
        refuse_strangers(where, given, answers[0].by_query())
    known = references_beside(answers) if given is None else [given] * len(answers)
    precision = resolve_precision(options.precision)
    measured = [
        _Measured(each, own, score_references(each, own, output, precision, options.microbatch_tokens))
        for each, own in zip(answers, known, strict=True)
    ]
    uses = score_answers(answers, options, output)
    metrics, signature = _metrics(measured, uses)
    _note_unequal_tokens(measured)
    report = EvalReport(
        queries=source or ", ".join(map(str, data)),
        seed=seed,
        reward_models=uses,
        bleu_signature=signature,
        policies=[
            PolicyResult(
                label=policy.label,
                policy=policy.name,
                metrics={name: metric.estimate(seed) for name, metric in own.items()},
            )
            for policy, own in zip(policies, metrics, strict=True)
        ],
        comparisons=_comparisons([policy.label for policy in policies], metrics, seed),
        settings={
            "data": [str(path) for path in data],
            "round": options.round,
            "references": where,
            "precision": precision,
            "reward_options": options.part(Rewards).values(),
            **(asked_settings(options, source) if source is not None else {}),
        },
    )
    _save(output, report, measured)
    return report


def _comparable(answers: Sequence[Answers]) -> list[Answers]:
    """The answers to the queries that every policy answered, in the order of the first one's."""
    found = [each.by_query() for each in answers]
    common = [query for query in found[0] if all(query in other for other in found)]
    if not common:
        raise UsageError(
            "the policies have no query in common, so they cannot be compared: give the queries an id column, or "
            "evaluate the policies one by one"
        )
    asked = {query: found[0][query][0]["x"] for query in common}
    differ = [
        query for query, x in asked.items() if not all(same_query(x, row["x"]) for own in found for row in own[query])
    ]
    if differ:
        raise UsageError(
            f"there are different queries x under the same id, in {named(differ)}: compare answers to the same queries"
        )
    left_out = len(set().union(*found)) - len(common)
    if left_out:
        print_to_log(f"{left_out} queries left out, which not every policy answered; {len(common)} are compared")
    return [
        Answers(each.policy, [row for query in common for row in own[query]])
        for each, own in zip(answers, found, strict=True)
    ]


def _metrics(
    measured: Sequence[_Measured], uses: Sequence[RewardModelUse]
) -> tuple[list[dict[str, Metric]], str | None]:
    """By policy: its metrics by name, rewards in the order of the reward models. And BLEU's signature."""
    found: list[dict[str, Metric]] = []
    signature = None
    scored = [id for id in measured[0].likelihoods if all(id in each.likelihoods for each in measured)]
    for each in measured:
        queries = each.answers.by_query()
        rows = list(queries.values())
        own: dict[str, Metric] = {
            f"reward:{use.name}": _mean(rows, lambda row, at=at: row["rewards"][at]) for at, use in enumerate(uses)
        }
        if scored:
            own["perplexity"] = Perplexity(np.array([each.likelihoods[id] for id in scored], dtype=np.float64))
        texts = {id: [row["y"] for row in query] for id, query in queries.items()}
        if answered := [id for id in texts if id in each.references]:
            own["bleu"], signature = bleu([texts[id] for id in answered], [each.references[id] for id in answered])
        own["length"] = _mean(rows, lambda row: row["tokens"])
        own["truncated"] = _mean(rows, lambda row: row["finish"] == "length")
        own |= {f"distinct_{n}": distinct(list(texts.values()), n) for n in (1, 2)}
        found.append(own)
    return found, signature


def _mean(rows: list[list[dict[str, Any]]], value: Any) -> Mean:
    return Mean(np.array([[sum(map(value, query)), len(query)] for query in rows], dtype=np.float64))


def _comparisons(labels: Sequence[str], metrics: Sequence[Mapping[str, Metric]], seed: int) -> list[Comparison]:
    """Every policy less the first, and the last less the one before it."""
    pairs = [(at, 0) for at in range(1, len(labels))]
    if len(labels) > 2:
        pairs.append((len(labels) - 1, len(labels) - 2))
    return [
        Comparison(
            label=labels[at], baseline=labels[base], metric=name, difference=metric.less(metrics[base][name], seed)
        )
        for at, base in pairs
        for name, metric in metrics[at].items()
    ]


def _note_unequal_tokens(measured: Sequence[_Measured]) -> None:
    first = measured[0].likelihoods
    for each in measured[1:]:
        if any(tokens != first[id][1] for id, (_, tokens) in each.likelihoods.items() if id in first):
            print_to_log(
                f"note: {each.answers.policy.label} and {measured[0].answers.policy.label} split the references into "
                "different tokens: their perplexities and lengths are not comparable"
            )


def _save(output: Path, report: EvalReport, measured: Sequence[_Measured]) -> None:
    rows = []
    for each in measured:
        policy = each.answers.policy
        for row in each.answers.rows:
            nats, tokens = each.likelihoods.get(row["query_id"], (None, None))
            reference = each.references.get(row["query_id"])
            own = {"reference": reference, "reference_nll": nats, "reference_tokens": tokens}
            rows.append(row | {"label": policy.label, "policy": policy.name} | own)
    reward_models = [use.model_dump() for use in report.reward_models]
    provenance = {"queries": report.queries, "seed": report.seed, "reward_models": reward_models}
    save_rows(output / TABLE, "evaluation", rows, provenance)
    write_atomic(output / RESULT, report.to_json())
