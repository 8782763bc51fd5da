"""`ple judge A B --judge SPEC`: verdicts of a language model or a reward model on two sources of responses."""

import sys
from collections.abc import Sequence
from typing import Any, get_args

from ple_data.common.digests import json_digest
from ple_data.common.finite import refuse_non_finite
from ple_data.common.progress import Progress
from ple_data.judge import results
from ple_data.judge.journal import Journal
from ple_data.judge.llm import APIS, LanguageModelJudge, parse_request_args
from ple_data.judge.prompt import load_template, preference
from ple_data.judge.results import REWARD, Outcome, Verdict
from ple_data.judge.sources import Pair, choose, load_pairs, named
from ple_data.rewards import RewardModel, load_reward_model, shown_spec
from schemas.errors import UsageError
from schemas.files import locked
from schemas.judging import Answer, Order, Reward
from schemas.options import Judge, Rewards

CHUNK = 1024
"""Responses that a reward model is given together, so that it can batch them by length."""
_CUT = {"length", "max_tokens"}  # finish reasons of an answer that the token limit ended


def judge(options: Judge) -> str:
    """Judges the responses of A and B to the same queries; gives back the report as text.

    spec: `openai:MODEL`, `anthropic:MODEL` (at `endpoint`, if not the maker's own) or `reward:SPEC`. Writes
    `verdicts.parquet`, `judge.json` and `answers.jsonl` or `rewards.jsonl` into `output`; run again it asks only
    for what is not there yet. Raises UsageError, LockedError, PleError.
    """
    a, b, output, seed, limit = options.a, options.b, options.output, options.seed or 0, options.limit
    judge, endpoint, template = options.spec or "", options.endpoint, options.template
    request_args = parse_request_args(options.request_args)
    kind, _, name = judge.partition(":")
    if kind not in (*APIS, REWARD) or not name:
        raise UsageError(f"--judge {shown_spec(judge)}: expected openai:MODEL, anthropic:MODEL or reward:SPEC")
    if kind == REWARD and (endpoint or template or request_args):
        raise UsageError(f"--judge {REWARD}:…: --endpoint, --template and --request-arg are for a language model")
    settings: dict[str, Any] = {"limit": limit, "seed": seed}
    pairs = load_pairs(a, b)
    print(pairs.count(), file=sys.stderr)
    chosen = choose(pairs.rows, limit, seed)
    with locked(output / ".lock"):
        if kind == REWARD:
            reward_model = load_reward_model(name, options)
            name, digest = f"{REWARD}:{reward_model.name}", None
            settings["reward_options"], more = options.part(Rewards).values(), {}
            results.refuse_other(output, a, b, name, digest)
            with Journal(output / "rewards.jsonl", Reward) as journal:
                verdicts = by_reward(reward_model, chosen, journal)
        else:
            model = LanguageModelJudge(kind, name, endpoint, load_template(template), request_args)
            name, digest = model.name, model.template.digest
            results.refuse_other(output, a, b, name, digest)
            with Journal(output / "answers.jsonl", Answer) as file:
                answers = model.ask(chosen, file, options.concurrency)
            verdicts = [by_answers(pair, answers) for pair in chosen]
            paid = list({answer.request: answer for answer in answers.values()}.values())
            _warn_unparsed(verdicts)
            _warn_cut(paid)
            settings |= {"endpoint": model.address, "request": model.request_fields}
            more = {**_tokens(paid), "orders_disagree": _orders_disagree(verdicts)}
        report = results.count(
            verdicts, pairs, a=a, b=b, judge=name, seed=seed, template=digest, settings=settings, **more
        )
        results.save(output, verdicts, report)
    return results.shown(report)


def by_answers(pair: Pair, answers: dict[tuple[str, Order], Answer]) -> Verdict:
    """A win or a lose where both orders agree; a tie where they do not or a judge says so; unparsed without a verdict
    in both.
    """
    texts = {order: answers.get((pair.query_id, order)) for order in ("a_first", "b_first")}
    sides = {"a_first": {"1": "a", "2": "b"}, "b_first": {"1": "b", "2": "a"}}
    said = {order: preference(answer.text) if answer else None for order, answer in texts.items()}
    choices = {order: sides[order].get(verdict or "", verdict) for order, verdict in said.items()}
    details = {**choices, **{f"{order}_answer": answer and answer.text for order, answer in texts.items()}}
    return Verdict(pair, _outcome(choices["a_first"], choices["b_first"]), details)


def _outcome(choice: str | None, other: str | None) -> Outcome:
    if choice is None or other is None:
        return "unparsed"
    if choice == other == "a":
        return "win"
    return "lose" if choice == other == "b" else "tie"


def _orders_disagree(verdicts: Sequence[Verdict]) -> int:
    """Ties of which the two answers chose differently."""
    return sum(v.outcome == "tie" and v.details["a_first"] != v.details["b_first"] for v in verdicts)


def by_reward(reward_model: RewardModel, pairs: Sequence[Pair], journal: Journal[Reward]) -> list[Verdict]:
    """The higher reward is better, equal ones are a tie. Raises PleError for a reward that is no finite number."""
    rewards = _rewards(reward_model, [(pair, y) for pair in pairs for y in (pair.a, pair.b)], journal)
    verdicts = []
    for pair, a, b in zip(pairs, rewards[::2], rewards[1::2], strict=True):
        outcome: Outcome = "win" if a > b else "lose" if a < b else "tie"
        verdicts.append(Verdict(pair, outcome, {"reward_a": a, "reward_b": b}))
    if reward_model.truncated:
        print(f"judge: {reward_model.truncated} texts were cut to fit the reward model", file=sys.stderr)
    return verdicts


def _rewards(reward_model: RewardModel, responses: Sequence[tuple[Pair, str]], journal: Journal[Reward]) -> list[float]:
    """One reward for each response, in order; the same (x, y) is scored once, now or in an earlier run."""
    requests = [json_digest([reward_model.name, pair.x, y]) for pair, y in responses]
    missing = {
        request: response for request, response in zip(requests, responses, strict=True) if journal.get(request) is None
    }
    waiting, total = list(missing.items()), len(set(requests))
    with Progress("judge", total, "rewards", done=total - len(waiting)) as progress:
        for start in range(0, len(waiting), CHUNK):
            part = waiting[start : start + CHUNK]
            for batch in reward_model.stream([(pair.x, y) for _, (pair, y) in part]):
                refuse_non_finite(
                    f"reward model {reward_model.name} gave rewards that are not finite",
                    [(f"query {part[at][1][0].query_id!r}", score) for at, score in batch],
                    "correct the model and run the same command again",
                )
                journal.add(*[Reward(request=part[at][0], reward=score) for at, score in batch])
                progress.advance(len(batch))
    kept = [journal.get(request) for request in requests]
    return [reward.reward for reward in kept if reward is not None]


def _warn_unparsed(verdicts: Sequence[Verdict]) -> None:
    """Name the queries of which an answer is there and holds no verdict."""
    silent = [
        verdict.pair.query_id
        for verdict in verdicts
        if any(verdict.details[o] is None and verdict.details[f"{o}_answer"] is not None for o in get_args(Order))
    ]
    if silent:
        print(
            f"judge: {len(silent)} queries are unparsed, an answer holds no verdict: {named(silent)}; answers are kept "
            f"and not asked again, see a_first_answer and b_first_answer in {results.TABLE}",
            file=sys.stderr,
        )


def _warn_cut(answers: Sequence[Answer]) -> None:
    cut = sum(answer.finish in _CUT and preference(answer.text) is None for answer in answers)
    if cut:
        print(
            f"judge: {cut} answers without a verdict were cut by the token limit: raise it, e.g. with "
            "--request-arg max_completion_tokens=4096 (anthropic: max_tokens)",
            file=sys.stderr,
        )


def _tokens(answers: Sequence[Answer]) -> dict[str, int]:
    silent = sum(answer.prompt_tokens is None or answer.completion_tokens is None for answer in answers)
    if silent:
        print(
            f"judge: the endpoint did not say how many tokens {silent} answers took; they count as 0", file=sys.stderr
        )
    return {
        "prompt_tokens": sum(answer.prompt_tokens or 0 for answer in answers),
        "completion_tokens": sum(answer.completion_tokens or 0 for answer in answers),
    }
