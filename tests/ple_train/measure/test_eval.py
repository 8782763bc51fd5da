"""`ple eval` and `ple cases`: every number against another way to compute it, and nothing sampled or scored twice."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from scipy import stats

import cli
import ple_train.measure.perplexity
from ple_data.common.digests import policy_name
from ple_data.evaluation import intervals
from ple_data.evaluation.intervals import bootstrap_mean
from ple_data.evaluation.metrics import bleu, distinct
from ple_data.evaluation.table import WIDTH, format_report
from ple_data.rewards import function, load_reward_model
from ple_data.sampling import generate
from ple_data.scoring import cache as score_cache
from ple_data.storage.store import Store
from ple_train.measure.evaluate import evaluate
from schemas import tables
from schemas.errors import DamagedError, LockedError, PleError, UsageError
from schemas.files import locked
from schemas.options import Evaluate, Rewards
from schemas.records import read_record
from schemas.reports import EvalReport
from schemas.tables import read_metadata, read_table
from tests import tiny
from tests.tables import table

GENERATION = {"max_new_tokens": 12, "engine": "hf", "unit_size": 8}
SENTENCES = tiny.corpus()[:14]
JUDGE = "def score(xs, ys):\n    return [len(set(y)) - len(x) / 7 for x, y in zip(xs, ys)]\n"


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def inputs(policy: Path, adapter: Path, reward: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What a comparison of a base model and its adapter takes: 14 queries, 12 of them with a reference."""
    place = tmp_path_factory.mktemp("eval")
    rows = [{"id": f"q{n}", "x": " ".join(s.split()[:2]), "reference": s[8:]} for n, s in enumerate(SENTENCES)]
    rows[3]["reference"] = " \n"
    del rows[7]["reference"]
    (place / "judge.py").write_text(JUDGE)
    return {
        "policy": [f"base={policy}", f"tuned={policy},{adapter}"],
        "queries": str(write_rows(place / "queries.jsonl", rows)),
        "output": place / "out",
        "reward_model": [str(reward), f"{place / 'judge.py'}:score"],
        "trained_with": [str(reward)],
        "seed": 3,
        **GENERATION,
    }


@pytest.fixture(scope="module")
def report(inputs: dict) -> EvalReport:
    return evaluate(Evaluate(**inputs))


@pytest.fixture(scope="module")
def rows(report: EvalReport, inputs: dict) -> dict[str, list[dict]]:
    """The rows of eval.parquet by policy."""
    found = read_table(inputs["output"] / "eval.parquet", "evaluation").to_pylist()
    return {label: [row for row in found if row["label"] == label] for label in ("base", "tuned")}


def metrics(report: EvalReport, label: str) -> dict:
    return next(policy.metrics for policy in report.policies if policy.label == label)


def difference(report: EvalReport, metric: str):
    return next(c.difference for c in report.comparisons if c.metric == metric)


def test_perplexity_is_that_of_a_plain_loop_in_float64(report, rows, policy: Path, adapter: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    base = AutoModelForCausalLM.from_pretrained(policy).double().eval()
    for label in ("base", "tuned"):  # the adapter is put into the base after it has been measured
        model = base if label == "base" else PeftModel.from_pretrained(base, adapter).double().eval()
        nats, tokens = 0.0, 0
        for row in rows[label]:
            if row["reference"] is None:
                assert row["reference_nll"] is None
                continue
            x = tokenizer(row["x"]).input_ids
            y = [*tokenizer(row["reference"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            with torch.no_grad():
                logps = model(torch.tensor([x + y])).logits[0].log_softmax(-1)
            own = -sum(logps[len(x) + at - 1, token].item() for at, token in enumerate(y))
            assert row["reference_nll"] == pytest.approx(own, rel=1e-5)
            assert row["reference_tokens"] == len(y)
            nats, tokens = nats + own, tokens + len(y)
        assert metrics(report, label)["perplexity"].mean == pytest.approx(math.exp(nats / tokens), rel=1e-5)
        assert metrics(report, label)["perplexity"].count == 12


def test_perplexity_of_a_chat_model_is_given_the_rendered_query(chat_policy: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    queries = write_rows(tmp_path / "q.jsonl", [{"x": "the film", "reference": "was great."}])
    found = evaluate(
        Evaluate(policy=[f"chat={chat_policy}"], queries=str(queries), output=tmp_path / "out", **GENERATION)
    )
    tokenizer = AutoTokenizer.from_pretrained(chat_policy)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the film"}], tokenize=False, add_generation_prompt=True
    )
    x = tokenizer(text, add_special_tokens=False).input_ids
    y = [*tokenizer("was great.", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(chat_policy)(
            torch.tensor([x + y]), labels=torch.tensor([[-100] * len(x) + y])
        ).loss
    estimate = found.policies[0].metrics["perplexity"]
    assert estimate.mean == pytest.approx(math.exp(loss.item()), rel=1e-4)
    assert (estimate.low, estimate.high, estimate.count) == (estimate.mean, estimate.mean, 1)


@pytest.mark.parametrize(("prompt_format", "end"), [("auto", "<|over|>"), ("plain", tiny.EOS)])
def test_a_references_end_is_that_of_a_turn(tmp_path: Path, prompt_format: str, end: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = tiny.tiny_tokenizer(chat=tiny.TURNS, special=("<|turn|>", "<|over|>"))
    policy = tiny.policy_of(tmp_path / "policy", tokenizer)
    queries = write_rows(tmp_path / "q.jsonl", [{"x": "the film", "reference": "was great."}])
    asked = {"policy": [f"a={policy}"], "queries": str(queries), "prompt_format": prompt_format, **GENERATION}
    found = evaluate(Evaluate(output=tmp_path / "out", **asked))
    x = "<|turn|>user\nthe film<|over|>\n<|turn|>assistant\n" if prompt_format == "auto" else "the film"
    x, y = tokenizer(x).input_ids, tokenizer(f"was great.{end}").input_ids
    with torch.no_grad():
        labels = torch.tensor([[-100] * len(x) + y])
        loss = AutoModelForCausalLM.from_pretrained(policy)(torch.tensor([x + y]), labels=labels).loss
    assert found.policies[0].metrics["perplexity"].mean == pytest.approx(math.exp(loss.item()), rel=1e-4)


def test_rewards_lengths_and_shares_are_means_of_the_rows(report, rows, reward: Path, inputs: dict) -> None:
    names = [use.name for use in report.reward_models]
    assert [use.trained for use in report.reward_models] == [True, False]
    for label, own in rows.items():
        pairs = [(row["x"], row["y"]) for row in own]
        expected = [load_reward_model(spec).score(pairs) for spec in inputs["reward_model"]]
        found = metrics(report, label)
        for at, name in enumerate(names):
            assert [row["rewards"][at] for row in own] == pytest.approx(expected[at], abs=1e-4)
            assert found[f"reward:{name}"].mean == pytest.approx(np.mean(expected[at]), abs=1e-4)
        assert found["length"].mean == pytest.approx(np.mean([row["tokens"] for row in own]))
        assert found["truncated"].mean == pytest.approx(np.mean([row["finish"] == "length" for row in own]))


def test_bleu_is_that_of_sacrebleus_command(report, rows, tmp_path: Path) -> None:
    for label, own in rows.items():
        scored = [row for row in own if row["reference"] is not None]
        for column, name in (("y", "hypotheses"), ("reference", "references")):
            lines = [" ".join(row[column].split()) for row in scored]
            (tmp_path / name).write_text("\n".join(lines) + "\n")
        command = ["-m", "sacrebleu", tmp_path / "references", "-i", tmp_path / "hypotheses", "-w", "6", "--force"]
        found = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
        printed = json.loads(found.stdout)
        assert metrics(report, label)["bleu"].mean == pytest.approx(printed["score"], abs=1e-6)
        assert printed["signature"] == report.bleu_signature


def test_intervals_are_scipys(report, rows) -> None:
    """Percentile bootstrap over queries with the report's seed, each statistic computed from the rows."""

    def interval(data, statistic, **more):
        found = stats.bootstrap(
            data,
            statistic,
            n_resamples=2000,
            confidence_level=0.95,
            method="percentile",
            rng=np.random.default_rng(report.seed),
            **more,
        )
        return pytest.approx(tuple(found.confidence_interval))

    base, tuned = ([row["rewards"][1] for row in rows[label]] for label in ("base", "tuned"))
    name = f"reward:{report.reward_models[1].name}"
    estimate = metrics(report, "base")[name]
    assert (estimate.low, estimate.high) == interval((base,), np.mean)
    paired = interval((tuned, base), lambda a, b, axis: np.mean(a - b, axis=axis), paired=True)
    assert (difference(report, name).low, difference(report, name).high) == paired
    assert difference(report, name).mean == pytest.approx(np.mean(tuned) - np.mean(base))

    nats, tokens = (
        [row[column] for row in rows["tuned"] if row["reference"]] for column in ("reference_nll", "reference_tokens")
    )
    estimate = metrics(report, "tuned")["perplexity"]
    ratio = interval((nats, tokens), lambda n, t, axis: np.exp(n.sum(axis) / t.sum(axis)), paired=True)
    assert (estimate.low, estimate.high) == ratio


def test_bleus_interval_is_that_of_resampled_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """From sums of sentence statistics as from the texts of each draw, scored anew by sacrebleu."""
    from sacrebleu.metrics import BLEU

    monkeypatch.setattr(intervals, "RESAMPLES", 60)
    responses = ["the film was great.", "the film seems very bad.", "", "a good actor helps.", "so so"]
    references = ["the film was great.", "this film seems bad.", "one scene was long", "a good actor helps me", "no"]
    others = references[1:] + references[:1]

    def corpus(texts, places):
        return BLEU(force=True).corpus_score([texts[i] for i in places], [[references[i] for i in places]]).score

    def interval(statistic):
        found = stats.bootstrap(
            (np.arange(5),),
            lambda places: statistic(places.astype(int)),
            vectorized=False,
            n_resamples=60,
            method="percentile",
            rng=np.random.default_rng(1),
        )
        return pytest.approx(tuple(found.confidence_interval))

    mine, _ = bleu([[y] for y in responses], references)
    theirs, _ = bleu([[y] for y in others], references)
    estimate, less = mine.estimate(1), mine.less(theirs, 1)
    assert estimate.mean == pytest.approx(corpus(responses, range(5)))
    assert (estimate.low, estimate.high) == interval(lambda places: corpus(responses, places))
    assert (less.low, less.high) == interval(lambda places: corpus(responses, places) - corpus(others, places))


def test_distinct_n_by_hand() -> None:
    """`a b a b` and `b c`: words a b a b b c, 3 distinct of 6; pairs ab ba ab | bc, 3 distinct of 4."""
    responses = [["a b a b"], ["b\n c"]]
    assert distinct(responses, 1).value == 3 / 6
    assert distinct(responses, 2).value == 3 / 4
    assert distinct(responses, 1).without.tolist() == [2 / 2, 2 / 4]
    assert distinct([[""], [" "]], 1).value == distinct([["word"]], 2).value == 0


def test_distinct_ns_interval_is_the_jackknife_and_covers(report, rows) -> None:
    """Against leaving each query out by hand; and 95 % intervals hold the value of other draws 9 times in 10 or more,
    where percentiles of a bootstrap never would.
    """
    texts = [row["y"] for row in rows["base"]]

    def value(ys):
        words = [word for y in ys for word in y.split()]
        return len(set(words)) / len(words)

    without = [value(texts[:at] + texts[at + 1 :]) for at in range(len(texts))]
    half = stats.norm.ppf(0.975) * np.sqrt((len(texts) - 1) * np.var(without))
    estimate = metrics(report, "base")["distinct_1"]
    assert estimate.mean == pytest.approx(value(texts))
    assert estimate.low == pytest.approx(max(0, value(texts) - half))
    assert estimate.high == pytest.approx(min(1, value(texts) + half))

    generator = np.random.default_rng(0)
    weights = 1 / np.arange(1, 2001)
    words = np.array([f"w{n}" for n in range(2000)])

    def draw():
        lengths = generator.integers(10, 30, 60)
        return [[" ".join(generator.choice(words, n, p=weights / weights.sum()))] for n in lengths]

    truth = np.mean([distinct(draw(), 1).value for _ in range(40)])
    found = [distinct(draw(), 1).estimate(0) for _ in range(40)]
    assert np.mean([estimate.low <= truth <= estimate.high for estimate in found]) >= 0.85


def test_a_mean_of_one_query_has_no_interval() -> None:
    found = bootstrap_mean([0.5])
    assert (found.mean, found.low, found.high, found.count) == (0.5, 0.5, 0.5, 1)


def test_files_of_the_result(report, rows, inputs: dict) -> None:
    assert read_record(EvalReport, inputs["output"] / "eval.json") == report
    metadata = read_metadata(inputs["output"] / "eval.parquet", "evaluation")
    assert metadata["version"] == 2
    assert [use["name"] for use in metadata["reward_models"]] == [use.name for use in report.reward_models]
    assert [len(own) for own in rows.values()] == [14, 14]
    assert rows["base"][0]["policy"] == report.policies[0].policy
    assert pl.read_parquet(inputs["output"] / "eval.parquet").height == 28


def test_the_same_seed_asks_the_same_of_the_same_policy(report, inputs: dict, tmp_path: Path) -> None:
    """Under another name and in another place: the same draws, so a difference of exactly 0."""
    base = inputs["policy"][0]
    given = inputs | {"reward_model": inputs["reward_model"][1:], "trained_with": [], "output": tmp_path}
    again = evaluate(Evaluate(**given | {"policy": [base, base.replace("base", "same")]}))
    assert metrics(again, "same") == metrics(again, "base")
    assert metrics(again, "base").items() <= metrics(report, "base").items()
    assert all((c.difference.mean, c.difference.low, c.difference.high) == (0, 0, 0) for c in again.comparisons)


# Nothing twice


def refuse(*_, **__):
    raise AssertionError("computed again")


def test_a_rerun_computes_nothing(report, inputs: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "make_engine", refuse)
    monkeypatch.setattr(ple_train.measure.perplexity, "load_policy", refuse)
    monkeypatch.setattr("ple_data.rewards.classifier.ClassifierReward.stream", refuse)
    monkeypatch.setattr("ple_data.rewards.function.FunctionReward.score", refuse)
    assert evaluate(Evaluate(**inputs)) == report


def counting_judge(place: Path, fail_after: int) -> str:
    """A reward function that notes each response it scores, and fails once after some of them."""
    (place / "judge.py").write_text(
        f"from pathlib import Path\nplace = Path({str(place)!r})\n"
        "def score(xs, ys):\n"
        "    done = (place / 'calls').read_text().splitlines() if (place / 'calls').exists() else []\n"
        f"    if len(done) >= {fail_after} and not (place / 'failed').exists():\n"
        "        (place / 'failed').touch()\n"
        "        raise RuntimeError('the judge is gone')\n"
        "    with open(place / 'calls', 'a') as file:\n"
        "        file.writelines(f'{x}|{y!r}\\n' for x, y in zip(xs, ys))\n"
        "    return [float(len(y)) for y in ys]\n"
    )
    return f"{place / 'judge.py'}:score"


def test_stopped_while_scoring_it_goes_on(inputs: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(function, "ROWS_A_CALL", 5)
    judge = counting_judge(tmp_path, fail_after=10)
    given = inputs | {"policy": inputs["policy"][:1], "reward_model": [judge], "trained_with": []}
    with pytest.raises(PleError, match="the judge is gone"):
        evaluate(Evaluate(**given))
    monkeypatch.setattr(generate, "make_engine", refuse)
    evaluate(Evaluate(**given))
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == len(set(calls)) == 14
    evaluate(Evaluate(**given | {"policy": inputs["policy"]}))  # one more policy: its 14 responses alone
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == len(set(calls)) == 28


def test_other_settings_are_other_answers(report, inputs: dict) -> None:
    """In the same folder, without a word: what was sampled before stays and serves again."""
    before = {path.name for path in (inputs["output"] / "answers").iterdir()}
    given = inputs | {"policy": inputs["policy"][:1], "reward_model": [], "trained_with": []}
    other = evaluate(Evaluate(**given | {"limit": 5}))
    assert other.policies[0].metrics["length"].count == 5
    assert before < {path.name for path in (inputs["output"] / "answers").iterdir()}
    assert evaluate(Evaluate(**inputs)) == report


def cached(place: Path, keys: list[str], compute) -> list:
    return score_cache.cached_scores(place, "judge", keys, compute, label="score", unit="responses", names=keys)


def one_each(places: list[int]):
    return [[(at, (1.0, None)) for at in range(len(places))]]


def test_one_process_scores_at_a_time(tmp_path: Path) -> None:
    cached(tmp_path, ["a"], one_each)
    [path] = tmp_path.glob("*.lock")
    with locked(path), pytest.raises(LockedError, match=r"locked by pid \d+ on"):
        cached(tmp_path, ["a"], refuse)
    assert cached(tmp_path, ["a"], refuse) == [(1.0, None)]


def test_a_damaged_file_of_scores_says_what_to_do(tmp_path: Path) -> None:
    cached(tmp_path, ["a"], one_each)
    [path] = tmp_path.glob("*.parquet")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DamagedError, match=f"remove {path}, and its numbers are computed anew"):
        cached(tmp_path, ["a"], refuse)


def test_scores_of_a_newer_program_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setitem(tables.VERSIONS, "scores", tables.VERSIONS["scores"] + 1)
        cached(tmp_path, ["a"], one_each)
    with pytest.raises(DamagedError, match="newer") as caught:
        cached(tmp_path, ["a"], refuse)
    assert "remove" not in str(caught.value)


def test_what_came_before_a_failure_is_kept_and_counted_as_done(tmp_path: Path, capsys) -> None:
    def fails(places: list[int]):
        yield [(1, (2.0, None))]
        raise PleError("the server is gone")

    def rest(places: list[int]):
        assert places == [0, 2]
        return [[(0, (1.0, None)), (1, (3.0, None))]]

    with pytest.raises(PleError, match="the server is gone"):
        cached(tmp_path, ["a", "b", "c"], fails)
    capsys.readouterr()
    assert [value for value, _ in cached(tmp_path, ["a", "b", "c"], rest)] == [1, 2, 3]
    assert "score: 1 of 3 responses were done before" in capsys.readouterr().err


def test_what_is_computed_is_saved_every_few_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores come one a second, twelve of them: a kill at any moment costs those of the last three seconds at most."""
    seconds, on_disk = [0.0], []
    monkeypatch.setattr(score_cache, "SECONDS_BETWEEN_SAVES", 3.0)
    monkeypatch.setattr(score_cache.time, "monotonic", lambda: seconds[0])

    def one_a_second(places: list[int]):
        for at in range(len(places)):
            seconds[0] += 1
            yield [(at, (float(at), None))]
            on_disk.extend(len(tables.read_table(path, "scores")) for path in tmp_path.glob("*.parquet"))

    keys = [f"{n}" for n in range(12)]
    cached(tmp_path, keys, one_a_second)
    assert on_disk == [3, 3, 3, 6, 6, 6, 9, 9, 9, 12]
    assert cached(tmp_path, keys, refuse) == [(float(n), None) for n in range(12)]


def test_many_rows_are_given_together(tmp_path: Path) -> None:
    given = []

    def note(places: list[int]):
        given.append(len(places))
        return one_each(places)

    cached(tmp_path, [f"{n}" for n in range(2500)], note)
    assert given == [1024, 1024, 452]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_no_number_is_named_and_not_kept(value: float, tmp_path: Path) -> None:
    with pytest.raises(PleError, match=f"judge gave values that are not finite: b = {value}; correct"):
        cached(tmp_path, ["a", "b"], lambda places: [[(0, (1.0, None))], [(1, (value, None))]])
    assert cached(tmp_path, ["a", "b"], lambda places: [[(0, (5.0, None))]]) == [(1.0, None), (5.0, None)]


def test_only_what_changes_the_answers_asks_anew(inputs: dict, tmp_path: Path, monkeypatch) -> None:
    """A moved model, another reference, a new column, a smaller batch: the same answers; another dtype: others."""
    model = Path(shutil.copytree(inputs["policy"][0].removeprefix("base="), tmp_path / "one"))
    queries, rows = tmp_path / "q.jsonl", [{"id": "a", "x": "the film", "reference": " was bad."}]
    write_rows(queries, rows)
    given = {"queries": str(queries), "output": tmp_path / "out", **GENERATION}
    first = evaluate(Evaluate(policy=[f"a={model}"], **given))
    model = model.rename(tmp_path / "two")
    write_rows(queries, [rows[0] | {"reference": " was great.", "more": 1}])
    with monkeypatch.context() as patched:
        patched.setattr(generate, "make_engine", refuse)
        again = evaluate(Evaluate(policy=[f"a={model}"], **given, engine_arg=["batch_size=1"]))
        assert again.policies[0].metrics["length"] == first.policies[0].metrics["length"]
        assert read_table(tmp_path / "out" / "eval.parquet", "evaluation")["reference"].to_pylist() == [" was great."]
        write_rows(queries, rows)
        patched.setattr(ple_train.measure.perplexity, "load_policy", refuse)
        assert evaluate(Evaluate(policy=[f"a={model}"], **given)).policies[0].metrics == first.policies[0].metrics
    for change in ({"dtype": "bfloat16"}, {"engine_arg": ["attn_implementation=eager"]}):
        evaluate(Evaluate(policy=[f"a={model}"], **given, **change))
    assert len(list((tmp_path / "out" / "answers").iterdir())) == 3


def test_the_report_says_what_it_was_made_with(report, inputs: dict, policy: Path, tmp_path: Path) -> None:
    expected = {
        "max_new_tokens": 12,
        "temperature": 1.0,
        "samples": 1,
        "limit": None,
        "precision": "float32",
        "seed": 3,
    }
    assert expected.items() <= report.settings.items()
    assert report.settings["reward_options"]["reward_dtype"] == "float32"
    old = {name: value for name, value in json.loads(report.to_json()).items() if name != "settings"}
    assert EvalReport.model_validate_json(json.dumps(old)).settings == {}


def test_the_perplexity_does_not_depend_on_the_tokens_in_memory(policy: Path, tmp_path: Path, monkeypatch) -> None:
    rows = [{"policy": policy_name(policy), "reference": " so" * n} for n in (1, 5, 9)]
    Store(tmp_path / "data").commit("answers", 0, "00000-aa", table("answers", rows), {})
    asked = []
    batches = ple_train.measure.perplexity.micro_batches
    monkeypatch.setattr(
        ple_train.measure.perplexity, "micro_batches", lambda *a, **k: asked.append(a[2]) or batches(*a, **k)
    )
    values = [
        evaluate(
            Evaluate(policy=[f"a={policy}"], data=[tmp_path / "data"], output=tmp_path / str(n), microbatch_tokens=n)
        )
        .policies[0]
        .metrics["perplexity"]
        .mean
        for n in (16, 4096)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert asked == [16, 4096]


def test_rewards_in_bfloat16_are_other_rewards(reward: Path) -> None:
    assert load_reward_model(str(reward)).name == policy_name(reward)
    assert load_reward_model(str(reward), Rewards(reward_dtype="bfloat16")).name == f"{policy_name(reward)}+bfloat16"


# From a store


def test_a_row_in_two_stores_counts_once_and_another_answer_counts(policy: Path, tmp_path: Path) -> None:
    """A copied store adds nothing; another draw of the same key is another answer. Found after the model moved."""
    name = f"elsewhere@{policy_name(policy).partition('@')[2]}"
    for folder, y in (("one", "so"), ("copy", "so"), ("other", "good")):
        rows = [{"policy": name, "y": y, "y_ids": [9] * len(y)}]
        Store(tmp_path / folder).commit("answers", 0, "00000-aa", table("answers", rows), {})
    stores = [tmp_path / folder for folder in ("one", "copy", "other")]
    found = evaluate(Evaluate(policy=[f"a={policy}"], data=stores, output=tmp_path / "out"))
    assert sorted(read_table(tmp_path / "out" / "eval.parquet", "evaluation")["y"].to_pylist()) == ["good", "so"]
    assert metrics(found, "a")["length"].mean == 3


@pytest.mark.parametrize(("x", "same"), [("\n\nHuman: Hi\n\nAssistant:", True), ("other", False)])
def test_different_queries_under_one_id_are_refused(x: str, same: bool, policy: Path, adapter: Path, tmp_path: Path):
    store = Store(tmp_path / "data")
    chat = '[{"role": "user", "content": "Hi"}]'
    for round, (name, own) in enumerate([(policy_name(policy), chat), (policy_name(policy, adapter), x)]):
        rows = [{"policy": name, "query_id": "a", "x": own}]
        store.commit("answers", round, f"0000{round}-aa", table("answers", rows, round), {})
    given = {"policy": [f"a={policy}", f"b={policy},{adapter}"], "data": [store.root], "output": tmp_path / "out"}
    if same:
        assert evaluate(Evaluate(**given)).policies[0].metrics["length"].count == 1
    else:
        with pytest.raises(UsageError, match="different queries x under the same id, in query 'a'"):
            evaluate(Evaluate(**given))


def test_options_of_sampling_are_refused_with_a_store(policy: Path, tmp_path: Path) -> None:
    words = ["eval", "--policy", f"a={policy}", "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    found = CliRunner().invoke(cli.ple, [*words, "--limit", "3", "--samples", "2"])
    assert found.exit_code == 2
    assert "--limit, --samples: not heeded with --data" in found.stderr
    found = CliRunner().invoke(cli.ple, words)
    assert "holds no responses of" in found.stderr


@pytest.mark.parametrize("kind", ["answers", "responses", "pairs"])
def test_responses_of_a_store(kind: str, policy: Path, adapter: Path, tmp_path: Path, monkeypatch) -> None:
    """Each policy's plain responses are found by its digests; a scored row is there twice and counts once."""
    monkeypatch.setattr(generate, "make_engine", refuse)
    store = Store(tmp_path / "data")
    for round, name in enumerate([policy_name(policy), policy_name(policy, adapter)]):
        rows = [{"policy": name, "y": f"so {round} so", "reference": " so so", "y_finish": "length"}, {"policy": name}]
        for each in {"pairs": ("responses", "pairs")}.get(kind, (kind,)):
            store.commit(each, round, f"0000{round}-aa", table(each, rows, round), {})
    given = {"policy": [f"a={policy}", f"b={policy},{adapter}"], "data": [store.root], "output": tmp_path / "out"}
    found = evaluate(Evaluate(**given))
    assert [metrics(found, label)["length"].count for label in "ab"] == [2, 2]
    assert metrics(found, "a")["truncated"].mean == 0.5
    assert metrics(found, "a")["perplexity"].count == 1
    assert metrics(found, "a")["distinct_1"].mean == 2 / 5  # so 0 so | so so
    one = evaluate(Evaluate(**given | {"policy": given["policy"][:1], "round": 0}))
    assert one.policies[0] == found.policies[0]
    with pytest.raises(UsageError, match=r"--policy b: .* \(round 0\) holds no responses of .*; it holds those of "):
        evaluate(Evaluate(**given | {"round": 0}))


def test_policies_are_compared_on_the_queries_that_both_answered(policy: Path, adapter: Path, tmp_path: Path, capsys):
    store = Store(tmp_path / "data")
    for label, ids in ((policy_name(policy), "abc"), (policy_name(policy, adapter), "bcd")):
        rows = [{"policy": label, "query_id": id, "x": id, "y_ids": [ord(id)] * ord(id)} for id in ids]
        store.commit("answers", 0, f"00000-{ids}", table("answers", rows), {})
    given = {"policy": [f"a={policy}", f"b={policy},{adapter}"], "data": [store.root], "output": tmp_path / "out"}
    found = evaluate(Evaluate(**given))
    assert "2 queries left out, which not every policy answered; 2 are compared" in capsys.readouterr().err
    assert metrics(found, "a")["length"].mean == metrics(found, "b")["length"].mean == (ord("b") + ord("c")) / 2


def test_several_samples_of_a_query_are_drawn_together(policy: Path, tmp_path: Path) -> None:
    """Lengths 1, 3 | 5, 7: a mean of 4, and draws of two queries have the means 2, 4 or 6."""
    rows = [
        {"policy": policy_name(policy), "query_id": id, "x": id, "sample": sample, "y_ids": [9] * n}
        for id, sample, n in (("a", 0, 1), ("a", 1, 3), ("b", 0, 5), ("b", 1, 7))
    ]
    Store(tmp_path / "data").commit("answers", 0, "00000-aa", table("answers", rows), {})
    found = evaluate(Evaluate(policy=[f"a={policy}"], data=[tmp_path / "data"], output=tmp_path / "out"))
    length = metrics(found, "a")["length"]
    assert (length.mean, length.low, length.high, length.count) == (4, 2, 6, 2)


def test_no_references_empty_responses_one_query(policy: Path, tmp_path: Path) -> None:
    row = {"policy": policy_name(policy), "y": "", "y_ids": [1], "y_empty": True}
    Store(tmp_path / "data").commit("answers", 0, "00000-aa", table("answers", [row]), {})
    given = {"policy": [f"a={policy}", f"b={policy}"], "data": [tmp_path / "data"], "output": tmp_path / "out"}
    found = evaluate(Evaluate(**given))
    assert not {"perplexity", "bleu"} & set(metrics(found, "a"))
    assert metrics(found, "a")["distinct_1"].mean == 0
    assert "No references, so neither perplexity nor BLEU" in format_report(found)
    references = write_rows(tmp_path / "r.jsonl", [{"id": "q0", "reference": "so so"}])
    found = evaluate(Evaluate(**given, references=str(references)))
    assert metrics(found, "a")["bleu"].mean == 0
    assert read_table(tmp_path / "out" / "eval.parquet", "evaluation")["reference"].to_pylist() == ["so so"] * 2


def test_references_longer_than_the_model_are_left_out(policy: Path, tmp_path: Path, capsys) -> None:
    rows = [{"policy": policy_name(policy), "reference": text} for text in ("so so", "so so " * 2000)]
    Store(tmp_path / "data").commit("answers", 0, "00000-aa", table("answers", rows), {})
    found = evaluate(Evaluate(policy=[f"a={policy}"], data=[tmp_path / "data"], output=tmp_path / "out"))
    assert (metrics(found, "a")["perplexity"].count, metrics(found, "a")["bleu"].count) == (1, 2)
    assert "a: 1 references left out of the perplexity: with x they exceed the 2048" in capsys.readouterr().err
    assert "perplexity is over the 1 queries that have a reference for it" in format_report(found)


# Input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": ["POLICY"]}, r"must be NAME=MODEL\[,ADAPTER\], such as sft=runs/sft"),
        ({"policy": ["a=POLICY,"]}, r"must be NAME=MODEL\[,ADAPTER\]"),
        ({"policy": ["a=POLICY", "a=POLICY"]}, "the name a stands twice"),
        ({"policy": ["a=/no/model"]}, "model directory /no/model does not exist"),
        ({"policy": ["a=POLICY,/no/adapter"]}, "/no/adapter is no adapter directory"),
        ({"queries": None}, "give either --queries, to sample responses, or --data"),
        ({"data": [Path("d")]}, "give either --queries, to sample responses, or --data"),
        ({"round": 0}, "--round is for --data"),
        ({"trained_with": ["another"]}, "--trained-with another must be one of the --reward-model options"),
        ({"reward_model": ["JUDGE", "JUDGE"]}, "is given twice"),
        ({"reward_model": ["no.py:score"]}, "there is no file"),
        ({"reward_model": ["POLICY"]}, "has 2 outputs .* choose the one that is the reward"),
        ({"reward_model": ["POLICY[2]"]}, r"has no output 2: --output-index is one of 0 = LABEL_0, 1 = LABEL_1"),
        ({"references": "colum"}, r"--references colum is neither a file nor a column of .*, which has id, x, ref"),
        ({"references": "no.jsonl"}, "no.jsonl does not exist"),
        ({"references": "STRANGERS"}, r"none of its ids is that of a query \(ids there: 'z'; queries: 'a'\)"),
        ({"trained_with": ["https://h/r?token=sesame"]}, "--trained-with https://h/r must be one of"),
        ({"reward_model": ["https://h/r?token=sesame"] * 2}, "--reward-model https://h/r is given twice"),
        ({"reward_model": ["https://me:sesame@h:port/r"]}, "its address is not of the form http://host:port/path"),
        ({"references": "QUERIES"}, "line 4: its id stands there twice"),
        ({"references": "number"}, "number is 1, which is no text"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_bad_input_is_one_sentence(change: dict, message: str, policy: Path, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(JUDGE)
    doubled = [{"id": "a", "reference": "1"}, {"id": "b", "reference": "2"}, {"id": "c"}, {"id": "a"}]
    write_rows(tmp_path / "doubled.jsonl", doubled)
    queries = write_rows(tmp_path / "q.jsonl", [{"id": "a", "x": "the film", "reference": "was", "number": 1}])
    write_rows(tmp_path / "strangers.jsonl", [{"id": "z", "reference": "1"}])
    words = {
        "STRANGERS": tmp_path / "strangers.jsonl",
        "POLICY": policy,
        "JUDGE": f"{tmp_path / 'judge.py'}:score",
        "QUERIES": tmp_path / "doubled.jsonl",
    }

    def filled(value):
        if isinstance(value, list):
            return [filled(each) for each in value]
        for word, real in words.items():
            value = value.replace(word, str(real)) if isinstance(value, str) else value
        return value

    given = {"policy": [f"a={policy}"], "queries": str(queries), "output": tmp_path / "out", "engine": "hf"}
    given |= {"max_new_tokens": 2}
    with pytest.raises(UsageError, match=message) as caught:
        evaluate(Evaluate(**given | {name: filled(value) for name, value in change.items()}))
    assert "\n" not in str(caught.value)
    assert "sesame" not in str(caught.value)
    assert not (tmp_path / "out").exists(), "refused only after something was sampled"


def test_rewards_that_are_no_numbers_are_named(policy: Path, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text("def score(xs, ys):\n    return [float('nan') for _ in ys]\n")
    Store(tmp_path / "data").commit("answers", 0, "00000-aa", table("answers", [{"policy": policy_name(policy)}]), {})
    given = {"policy": [f"a={policy}"], "data": [tmp_path / "data"], "output": tmp_path / "out"}
    with pytest.raises(
        PleError, match=r"judge\.py:score@\w+ gave values that are not finite: query 'q0' sample 0 = nan"
    ):
        evaluate(Evaluate(**given, reward_model=[f"{tmp_path / 'judge.py'}:score"]))


def test_an_output_of_a_classifier_may_be_part_of_its_name(tmp_path: Path) -> None:
    model = tiny.tiny_reward(tmp_path / "two", num_labels=2)
    pair = [("the film", " was great.")]
    assert load_reward_model(f"{model}[1]").score(pair) == load_reward_model(str(model), Rewards(output_index=1)).score(
        pair
    )
    assert load_reward_model(f"{model}[0]", Rewards(output_index=1)).name.endswith("[0]")


# What is shown


def test_the_command_prints_a_table_or_json(report, inputs: dict) -> None:
    options = [
        "--engine",
        "hf",
        "--max-new-tokens",
        "12",
        "--seed",
        "3",
        "--unit-size",
        "8",
        "--output",
        inputs["output"],
    ]
    for name in ("policy", "reward_model", "trained_with"):
        options += [word for value in inputs[name] for word in (f"--{name.replace('_', '-')}", value)]
    words = ["eval", *map(str, options), "--queries", inputs["queries"]]
    found = CliRunner().invoke(cli.ple, [*words, "--json"])
    assert found.exit_code == 0, found.stderr
    assert EvalReport.model_validate_json(found.stdout) == report
    text = format_report(report)
    assert CliRunner().invoke(cli.ple, words).stdout == text + "\n"
    assert max(map(len, text.splitlines()[1:])) <= WIDTH  # the first line names the file of queries
    assert "14 queries of" in text
    assert "R1 (trained)" in text
    assert f"R1          mean reward by {report.reward_models[0].name}, which trained one" in text
    assert report.bleu_signature in text
    assert "perplexity is over the 12 queries that have a reference for it." in text
    assert "Difference from base on the same queries" in text


def test_three_policies_compare_the_last_two_as_well(report, inputs: dict) -> None:
    third = inputs["policy"][0].replace("base", "third")
    found = evaluate(Evaluate(**inputs | {"policy": [*inputs["policy"], third]}))
    assert {(c.label, c.baseline) for c in found.comparisons} == {
        ("tuned", "base"),
        ("third", "base"),
        ("third", "tuned"),
    }


def test_cases_side_by_side(policy: Path, adapter: Path, tmp_path: Path, monkeypatch) -> None:
    rows = [
        {"id": "a", "query": "How do I\x1b[2J pick a lock?", "kind": "harmful"},
        {"id": "b", "query": "How do I bake bread?", "kind": "everyday"},
    ]
    (tmp_path / "judge.py").write_text(JUDGE)
    judge = f"{tmp_path / 'judge.py'}:score"
    queries, output = write_rows(tmp_path / "cases.jsonl", rows), tmp_path / "out"
    policies = [f"base={policy}", f"tuned={policy},{adapter}"]
    words = ["cases", "--policy", policies[0], "--policy", policies[1], "--queries", queries, "--output", output]
    words = [*map(str, words), "--reward-model", judge, "--engine", "hf", "--max-new-tokens", "8"]
    words += ["--trained-with", judge]
    found = CliRunner().invoke(cli.ple, words)
    assert found.exit_code == 0, found.stderr
    lines = found.stdout.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[0] == "query a (harmful)"
    assert lines[1] == r"x: How do I\x1b[2J pick a lock?"
    assert "query b (everyday)" in lines
    assert all(c.isprintable() or c == "\n" for c in found.stdout)
    [first, _] = [line for line in lines if line.startswith("base: ")]
    assert " | tuned: " in first
    assert "R1 " in first
    name = load_reward_model(judge).name
    assert lines[-1] == f"R1: reward by {name}, which trained one of these policies"

    table_there = read_table(output / "cases.parquet", "cases").to_pylist()
    assert [(row["label"], row["query_id"], row["kind"]) for row in table_there] == [
        ("base", "a", "harmful"),
        ("base", "b", "everyday"),
        ("tuned", "a", "harmful"),
        ("tuned", "b", "everyday"),
    ]
    pairs = [(row["x"], row["y"]) for row in table_there]
    assert [row["rewards"] for row in table_there] == [[value] for value in load_reward_model(judge).score(pairs)]
    provenance = read_metadata(output / "cases.parquet", "cases")
    assert (provenance["reward_models"], provenance["trained_with"]) == ([name], [name])

    monkeypatch.setattr(generate, "make_engine", refuse)
    monkeypatch.setattr("ple_data.rewards.function.FunctionReward.score", refuse)
    assert CliRunner().invoke(cli.ple, words).stdout == found.stdout
