"""`ple judge`: which judge it is, and verdicts of a language model or a reward model on two sources of responses."""

import sys
from collections.abc import Sequence
from typing import Any, get_args

from ple_data.common.click_options import refuse_given
from ple_data.common.digests import json_digest, text_digest
from ple_data.common.finite import refuse_non_finite
from ple_data.common.journal import Journal
from ple_data.common.llm import APIS, parse_request_args
from ple_data.common.progress import Progress
from ple_data.common.settings import counted
from ple_data.judge import people, results
from ple_data.judge.llm import LanguageModelJudge
from ple_data.judge.prompt import load_template, preference
from ple_data.judge.results import REWARD, Outcome, Verdict
from ple_data.judge.sources import Pair, choose, load_pairs, named
from ple_data.rewards import RewardModel, as_read, load_reward_model, shown_spec
from schemas.errors import UsageError
from schemas.files import locked
from schemas.judging import Answer, Order, Reward
from schemas.options import Judge, Rewards

CHUNK = 1024
"""Responses that a reward model is given together, so that it can batch them by length."""
_CUT = {"length", "max_tokens"}  # finish reasons of an answer that the token limit ended


def run(options: Judge) -> str:
    """Judge by a model, write a page for people, or read what they chose → the text to print. Raises UsageError."""
    if options.human == (options.spec is not None):
        raise UsageError("give either --judge SPEC or --human")
    if options.spec is not None:
        refuse_given(["People"], "without --human")
        if options.spec.startswith("reward:"):
            refuse_given(["Language model"], "by a reward model")
        else:
            refuse_given(["Reward model"], "by a language model")
        return judge(options)
    refuse_given(["Language model", "Reward model"], "with --human")
    a, b, output = options.a, options.b, options.output
    if options.exports:
        refuse_given([], "with --read, which goes by what the page was made with", "limit", "seed", "label_studio")
        return people.read_exports(a, b, options.exports, output)
    limit, seed = options.limit, options.seed
    return people.write_page(a, b, output, limit=limit, seed=seed, label_studio=options.label_studio)


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
    pairs = load_pairs(a, b)
    print(pairs.count(), file=sys.stderr)
    chosen = choose(pairs.rows, limit, seed)
    settings: dict[str, Any] = {"limit": limit, "seed": seed}
    more: dict[str, Any] = {}
    with locked(output / ".lock"):
        if kind == REWARD:
            reward_model = load_reward_model(name, options, output / "ratings")
            name = f"{REWARD}:{reward_model.name}"
            results.refuse_other(output, a, b, name, None)
            with Journal(output / "rewards.jsonl", Reward) as journal:
                verdicts = by_reward(reward_model, chosen, journal)
            settings["reward_options"] = counted(options.part(Rewards))
        else:
            model = LanguageModelJudge(kind, name, endpoint, load_template(template), request_args)
            name, digest = model.name, text_digest(model.template.text)
            results.refuse_other(output, a, b, name, digest)
            with Journal(output / "answers.jsonl", Answer) as file:
                answers = model.verdicts(chosen, file, options.concurrency)
            verdicts = [by_answers(pair, answers) for pair in chosen]
            paid = list({answer.request: answer for answer in answers.values()}.values())
            _warn(verdicts, paid)
            settings |= {"endpoint": model.address, "request": model.request_fields}
            ties = [verdict.details for verdict in verdicts if verdict.outcome == "tie"]
            more = {
                "template": digest,
                "prompt_tokens": sum(answer.prompt_tokens or 0 for answer in paid),
                "completion_tokens": sum(answer.completion_tokens or 0 for answer in paid),
                "orders_disagree": sum(chosen["a_first"] != chosen["b_first"] for chosen in ties),
            }
        return results.conclude(output, verdicts, pairs, judge=name, seed=seed, settings=settings, **more)


def by_answers(pair: Pair, answers: dict[tuple[str, Order], Answer]) -> Verdict:
    """A win or a lose where both orders agree; a tie where they do not or a judge says so; unparsed without a verdict
    in both.
    """
    sides = {"a_first": {"1": "a", "2": "b"}, "b_first": {"1": "b", "2": "a"}}
    details: dict[str, str | None] = {}
    for order in get_args(Order):
        answer = answers.get((pair.query_id, order))
        said = preference(answer.text) if answer else None
        details |= {order: sides[order].get(said or "", said), f"{order}_answer": answer.text if answer else None}
    both = details["a_first"], details["b_first"]
    outcomes: dict[tuple[str | None, str | None], Outcome] = {("a", "a"): "win", ("b", "b"): "lose"}
    return Verdict(pair, "unparsed" if None in both else outcomes.get(both, "tie"), details=details)


def by_reward(reward_model: RewardModel, pairs: Sequence[Pair], journal: Journal[Reward]) -> list[Verdict]:
    """The higher reward is better, equal ones are a tie; the same (x, y) is scored once, now or in an earlier run.

    Raises PleError for a reward that is no finite number.
    """
    read = {chat: as_read(reward_model, [pair.x for pair in pairs], chat=chat) for chat in (False, True)}
    asked = [(pair.query_id, read[pair.chat][at]) for at, pair in enumerate(pairs)]
    responses = [(id, x, y) for (id, x), pair in zip(asked, pairs, strict=True) for y in (pair.a, pair.b)]
    requests = [json_digest([reward_model.name, x, y]) for _, x, y in responses]
    distinct = dict(zip(requests, responses, strict=True))
    waiting = [(request, *of) for request, of in distinct.items() if journal.get(request) is None]
    with Progress("judge", len(distinct), "rewards", done=len(distinct) - len(waiting)) as progress:
        for start in range(0, len(waiting), CHUNK):
            part = waiting[start : start + CHUNK]
            for batch in reward_model.stream([(x, y) for _, _, x, y in part]):
                refuse_non_finite(
                    f"reward model {reward_model.name} gave rewards that are not finite",
                    [(f"query {part[at][1]!r}", score) for at, score in batch],
                    "correct the model and run the same command again",
                )
                journal.add(*[Reward(request=part[at][0], reward=score) for at, score in batch])
                progress.advance(len(batch))
    if reward_model.truncated:
        print(f"judge: {reward_model.truncated} texts were cut to fit the reward model", file=sys.stderr)
    rewards = [journal[request].reward for request in requests]
    verdicts = []
    for pair, a, b in zip(pairs, rewards[::2], rewards[1::2], strict=True):
        outcome: Outcome = "win" if a > b else "lose" if a < b else "tie"
        verdicts.append(Verdict(pair, outcome, details={"reward_a": a, "reward_b": b}))
    return verdicts


def _warn(verdicts: Sequence[Verdict], paid: Sequence[Answer]) -> None:
    """Say which queries have an answer without a verdict, how many answers were cut, and where tokens are not known."""
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
    if cut := sum(answer.finish in _CUT and preference(answer.text) is None for answer in paid):
        print(
            f"judge: {cut} answers without a verdict were cut by the token limit: raise it, e.g. with "
            "--request-arg max_completion_tokens=4096 (anthropic: max_tokens)",
            file=sys.stderr,
        )
    if unsaid := sum(answer.prompt_tokens is None or answer.completion_tokens is None for answer in paid):
        print(
            f"judge: the endpoint did not say how many tokens {unsaid} answers took; they count as 0", file=sys.stderr
        )
