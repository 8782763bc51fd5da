"""`ple eval`: several policies on the same queries, in rewards, KL, perplexity, BLEU, length and distinct words.

Answers, rewards and likelihoods are kept in the output directory as they come, so that a rerun computes what is
missing and no more. Every number has a 95 % interval over queries. Never trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ple_data.common.settings import counted
from ple_data.evaluation.answers import Answers, asked_settings, sample_answers, stored_answers
from ple_data.evaluation.metrics import Mean, Metric, Perplexity, bleu, distinct, need_bleu
from ple_data.evaluation.policies import parse_policies
from ple_data.evaluation.references import load_references, references_beside, refuse_strangers
from ple_data.evaluation.rewards import check_reward_models, score_answers
from ple_data.judge.sources import named, same_query
from ple_data.storage.parquet import save_rows
from ple_train.log import print_to_log
from ple_train.measure.divergence import score_responses
from ple_train.measure.perplexity import Likelihoods, score_references
from ple_train.model.policy import resolve_precision
from schemas.errors import UsageError
from schemas.files import write_atomic
from schemas.options import Evaluate, Rewards
from schemas.reports import Comparison, EvalReport, PolicyResult, RewardModelUse

RESULT, TABLE = "eval.json", "eval.parquet"
Row = dict[str, Any]


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
    left_out: list[str] = []
    for at, (each, references) in enumerate(zip(answers, known, strict=True)):
        likelihoods = Likelihoods(each.policy, output, precision, options.microbatch_tokens)
        score_references(each, references, likelihoods)
        left_out += score_responses(answers, at, likelihoods)
    for sentence in left_out:
        print_to_log(sentence)
    with_bleu = True
    if given is None and any(known):
        try:
            need_bleu()
        except UsageError as error:  # references that nobody asked for
            with_bleu = False
            left_out.append(f"No BLEU: {error}")
    uses = score_answers(answers, options, output)
    metrics, signature = _metrics([each.by_query() for each in answers], uses, with_bleu)
    _note_unequal_tokens(answers)
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
            "reward_options": counted(options.part(Rewards)),
            **(asked_settings(options, source) if source is not None else {}),
        },
        left_out=left_out,
    )
    reward_models = [use.model_dump() for use in uses]
    provenance = {"queries": report.queries, "seed": seed, "reward_models": reward_models}
    save_rows(output / TABLE, "evaluation", [row for each in answers for row in each.rows], provenance)
    write_atomic(output / RESULT, report.to_json())
    print_to_log(f"all numbers are in {output / RESULT}, every answer in {output / TABLE}")
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
        replace(each, rows=[row for query in common for row in own[query]])
        for each, own in zip(answers, found, strict=True)
    ]


def _metrics(
    policies: Sequence[dict[str, list[Row]]], uses: Sequence[RewardModelUse], with_bleu: bool
) -> tuple[list[dict[str, Metric]], str | None]:
    """Of each policy's rows by query: its metrics by name, rewards in the order of `uses`. And BLEU's signature."""
    found: list[dict[str, Metric]] = []
    signature = None
    scored = [id for id in policies[0] if all(own[id][0]["reference_nll"] is not None for own in policies)]
    every = [row for own in policies for query in own.values() for row in query]
    kept = {name for name in ("own_logps", "first_logps") if all(row.get(name) is not None for row in every)}
    for queries in policies:
        rows = list(queries.values())
        own: dict[str, Metric] = {
            f"reward:{use.name}": _mean(rows, lambda row, at=at: row["rewards"][at]) for at, use in enumerate(uses)
        }
        own |= _divergence(rows, kept)
        if scored:
            likelihoods = [(queries[id][0]["reference_nll"], queries[id][0]["reference_tokens"]) for id in scored]
            own["perplexity"] = Perplexity(np.array(likelihoods, dtype=np.float64))
        if with_bleu and (answered := [query for query in rows if query[0]["reference"] is not None]):
            own["bleu"], signature = bleu(_texts(answered), [query[0]["reference"] for query in answered])
        own["length"] = _mean(rows, lambda row: row["tokens"])
        own["truncated"] = _mean(rows, lambda row: row["finish"] == "length")
        own |= {f"distinct_{n}": distinct(_texts(rows), n) for n in (1, 2)}
        found.append(own)
    return found, signature


def _texts(rows: list[list[Row]]) -> list[list[str]]:
    return [[row["y"] for row in query] for query in rows]


def _mean(rows: list[list[Row]], value: Any, over: Any = lambda row: 1) -> Mean:
    """Sum of a value over all rows, by their number or by the sum of what else is given."""
    return Mean(np.array([[sum(map(value, query)), sum(map(over, query))] for query in rows], dtype=np.float64))


def _divergence(rows: list[list[Row]], kept: set[str]) -> dict[str, Metric]:
    """KL to the first policy in nats a response; entropy, and mean log-probability under the first policy, in nats a
    token: all estimated on the policy's own draws. kept: the log-probabilities that every row has.
    """
    found: dict[str, Metric] = {}
    if "own_logps" in kept:
        found["entropy"] = _mean(rows, lambda row: -row["own_logps"], lambda row: row["tokens"])
    if len(kept) == 2:
        found["kl"] = _mean(rows, lambda row: row["own_logps"] - row["first_logps"])
        found["mean_logps_first"] = _mean(rows, lambda row: row["first_logps"], lambda row: row["tokens"])
    return found


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


def _note_unequal_tokens(answers: Sequence[Answers]) -> None:
    first = {row["query_id"]: row["reference_tokens"] for row in answers[0].rows}
    for each in answers[1:]:
        counts = [(row["reference_tokens"], first[row["query_id"]]) for row in each.rows]
        if any(own != other for own, other in counts if own is not None and other is not None):
            print_to_log(
                f"note: {each.policy.label} and {answers[0].policy.label} split the references into different tokens: "
                "their perplexities and lengths are not comparable"
            )
