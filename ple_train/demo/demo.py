"""`ple demo`: the whole job on a toy world of film reviews, through the same child processes as a real run.

A small language model is trained from nothing, a reward model from labelled reviews, then the recipe is run: SFT and
rounds of ple-gen, ple-score and ple-train. Everything shown is measured here. Every step is skipped when it is done.
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ple_data.common.command import say
from ple_data.common.extras import need
from ple_data.evaluation.intervals import bootstrap_mean
from ple_train.demo import toyworld
from ple_train.demo.scratch import train_tokenizer, write_llama
from ple_train.run.child import run_child
from ple_train.run.rounds import find_program, refuse_failure
from schemas.errors import UsageError
from schemas.files import write_atomic
from schemas.options import Rewards
from schemas.reports import Estimate

SEED = 0
TAU0, ALPHA = 0.2, 0.9
UNSEEN = 400
MAX_NEW_TOKENS = 80
QUERIES_PER_ROUND = 256
PRETRAINING, LABELLED, FINE_TUNING, HELD_OUT = 5000, 2400, 2600, 400


def demo(output: Path, *, rounds: int) -> str:
    """Runs what is left of the demo in `output` and gives its closing report."""
    from ple_data.partition import round_statistics
    from ple_data.storage.store import Store

    recipe = _write_world(output, rounds)
    files = ["--model", output / "untrained", "--data", output / "data" / "reviews.jsonl", "--output", output / "base"]
    _ple("sft", *files, "--full", "--learning-rate", 2e-3, "--schedule", "cosine", "--warmup-steps", 20)
    _ple("run", recipe)
    measures = [_measured(output, t) for t in range(-1, rounds)]
    by_round = round_statistics(Store(output / "run" / "data").scan("pairs"), TAU0, ALPHA).to_dicts()
    return _report(output, by_round, measures, _draw(output / "learning-curve.png", by_round, measures))


def _write_world(output: Path, rounds: int) -> Path:
    """Data, untrained model and recipe; the same bytes each time."""
    from ple_data.inputs.principles import load_principle

    data = output / "data"
    every = toyworld.openings()
    unseen, seen = every[::5][:UNSEEN], [x for index, x in enumerate(every) if index % 5]
    principle = load_principle("imdb").text
    reviews = toyworld.reviews(SEED, seen)
    pretraining = list(itertools.islice(reviews, PRETRAINING))
    toyworld.write_rows(data / "reviews.jsonl", _texts(pretraining))
    toyworld.write_rows(data / "labels.jsonl", itertools.islice(_labelled(reviews), LABELLED))
    toyworld.write_rows(data / "unseen-labels.jsonl", itertools.islice(_labelled(reviews), HELD_OUT))
    plain = _texts(itertools.islice(reviews, FINE_TUNING // 2))
    praise = (r for r in reviews if r.polarity >= 0.5)
    guided = _texts(itertools.islice(praise, FINE_TUNING // 2), f"{principle}\n")
    toyworld.write_rows(data / "sft.jsonl", [*plain, *guided])
    toyworld.write_rows(data / "queries.jsonl", [{"x": x} for x in seen])
    toyworld.write_rows(data / "unseen.jsonl", [{"x": x} for x in unseen])
    held_out = itertools.islice(toyworld.reviews(SEED + 1, unseen), HELD_OUT)
    toyworld.write_rows(data / "held-out.jsonl", _texts(held_out))
    if not (output / "untrained").exists():
        tokenizer = train_tokenizer([principle, *(review.text for review in pretraining)], 768)
        write_llama(output / ".untrained", tokenizer, hidden=128, layers=3, heads=4, positions=512, seed=SEED)
        (output / ".untrained").rename(output / "untrained")
    recipe = output / "recipe.yaml"
    quoted = json.dumps(str(output))[1:-1]
    settings = {"rounds": rounds, "queries": QUERIES_PER_ROUND, "seed": SEED, "tau0": TAU0, "alpha": ALPHA}
    template = Path(__file__).with_name("recipe.yaml").read_text(encoding="utf-8")
    write_atomic(recipe, template.format(output=quoted, **settings))
    return recipe


def _texts(reviews: Iterable[toyworld.Review], before: str = "") -> list[dict[str, Any]]:
    return [{"x": before + review.opening, "y": review.body} for review in reviews]


def _labelled(reviews: Iterator[toyworld.Review]) -> Iterator[dict[str, Any]]:
    return ({"text": r.text, "label": int(r.polarity > 0)} for r in reviews if r.polarity != 0)


def _ple(*words: object) -> None:
    command = [find_program("ple"), *(str(word) for word in words)]
    say(f"demo: {shlex.join(command)}")
    refuse_failure(f"ple {words[0]}", run_child(command).code)


class Measure(BaseModel):
    """One policy on the unseen queries and reviews. Rewards are by the reward model, polarity by the grammar."""

    policy: str
    reward: Estimate
    polarity: Estimate
    grammatical: float
    perplexity: float


def _measured(output: Path, t: int) -> Measure:
    """The policy after round t (-1: the start policy), measured once and kept in a file."""
    from ple_data.rewards import load_reward_model
    from ple_train.measure.perplexity import perplexity
    from ple_train.measure.sample import sample_responses

    name = "start" if t < 0 else f"round={t:03d}"
    cache = output / "measures" / f"{name}.json"
    if cache.exists():
        return Measure.model_validate_json(cache.read_bytes())
    say(f"demo: measuring the policy after {name} on {UNSEEN} unseen queries")
    start, adapter = str(output / "run" / "sft"), None if t < 0 else str(output / "run" / "policy" / name)
    queries = [json.loads(line)["x"] for line in (output / "data" / "unseen.jsonl").read_text().splitlines()]
    responses = sample_responses(start, queries, adapter=adapter, engine="hf", max_new_tokens=MAX_NEW_TOKENS, seed=SEED)
    rewards = load_reward_model(str(output / "run" / "reward"), Rewards(output_index=1)).score(
        list(zip(queries, responses, strict=True))
    )
    verdicts = [toyworld.grade(response) for response in responses]
    measure = Measure(
        policy=name,
        reward=bootstrap_mean(rewards),
        polarity=bootstrap_mean([verdict.polarity for verdict in verdicts]),
        grammatical=sum(verdict.grammatical for verdict in verdicts) / len(verdicts),
        perplexity=perplexity(start, output / "data" / "held-out.jsonl", adapter=adapter),
    )
    write_atomic(cache, measure.model_dump_json(indent=1))
    return measure


def _accuracy(output: Path) -> float:
    """Share of unseen labelled reviews that the reward model gets right."""
    from ple_data.rewards import load_reward_model

    rows = [json.loads(line) for line in (output / "data" / "unseen-labels.jsonl").read_text().splitlines()]
    texts = [("", row["text"]) for row in rows]
    blame, praise = (
        load_reward_model(str(output / "run" / "reward"), Rewards(output_index=i)).score(texts) for i in (0, 1)
    )
    found = [int(p > b) for b, p in zip(blame, praise, strict=True)]
    return sum(label == row["label"] for label, row in zip(found, rows, strict=True)) / len(rows)


def _draw(path: Path, by_round: list[dict[str, Any]], measures: list[Measure]) -> str:
    """The learning curve: s and s_prompt of the pairs by round, and the reward on unseen queries after it.

    Gives back where it is, or what to install to have one: the demo itself runs without matplotlib.
    """
    try:
        need("matplotlib", "it is drawn with")
    except UsageError as error:
        return str(error)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    rounds = [row["round"] for row in by_round]
    axes.plot(
        rounds, [row["mean_s_prompt"] for row in by_round], "o-", color="#1b7837", label="s_prompt, with the principle"
    )
    axes.plot(rounds, [row["mean_s"] for row in by_round], "o-", color="#762a83", label="s, without")
    places = [t - 0.08 for t in range(len(measures))]
    rewards = [measure.reward for measure in measures]
    errors = [[r.mean - r.low for r in rewards], [r.high - r.mean for r in rewards]]
    label = f"unseen queries, without (95 % interval of {rewards[0].count})"
    axes.errorbar(places, [r.mean for r in rewards], yerr=errors, fmt="s", color="#888888", capsize=3, label=label)
    axes.set_xticks(range(len(measures)))
    axes.set_xlabel("rounds of training before")
    axes.set_ylabel("mean reward")
    axes.set_title("PLE on the toy review world")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return str(path)


def _report(output: Path, by_round: list[dict[str, Any]], measures: list[Measure], curve: str) -> str:
    pairs = ["round     tau       s  s_prompt    gap  rank set"]
    pairs += [
        f"{row['round']:>5}  {row['tau']:>6.3f}  {row['mean_s']:>6.2f}  {row['mean_s_prompt']:>8.2f}  "
        f"{row['mean_margin']:>5.2f}  {100 * row['rank_share']:>6.0f} %"
        for row in by_round
    ]
    unseen = ["policy     reward model          the grammar itself    grammatical  perplexity"]
    unseen += [
        f"{measure.policy:<9}  {measure.reward!s:<20}  {measure.polarity!s:<20}  {100 * measure.grammatical:>9.0f} %"
        f"  {measure.perplexity:>10.2f}"
        for measure in measures
    ]
    template = Path(__file__).with_name("report.txt").read_text(encoding="utf-8")
    rewards = {"before": measures[0].reward, "after": measures[-1].reward}
    tables = {"pairs": "\n".join(pairs), "unseen": "\n".join(unseen)}
    right = f"{100 * _accuracy(output):.0f}"
    sizes = {"unseen_queries": UNSEEN, "held_out": HELD_OUT}
    return template.format(**rewards, **tables, **sizes, right=right, curve=curve, output=output).rstrip("\n")
