"""KL to the first policy and entropy of `ple eval`: against float64 logits and exact sums over the vocabulary."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import ple_train.measure.perplexity
from ple_data.common.digests import policy_name
from ple_data.evaluation.table import WIDTH, format_report
from ple_data.storage.store import Store
from ple_train.measure.evaluate import evaluate
from schemas.options import Evaluate
from schemas.reports import EvalReport
from schemas.tables import read_table
from tests import tiny
from tests.tables import table

DIVERGENCE = {"kl", "entropy", "mean_logps_first"}
AS_IS = {"sampling": {"temperature": 1.0, "top_p": 1.0}}


def queries(path: Path, count: int) -> str:
    rows = [{"id": f"q{n}", "x": " ".join(text.split()[:2])} for n, text in enumerate(tiny.corpus()[:count])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def inputs(policy: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    place = tmp_path_factory.mktemp("divergence")
    return {
        "policy": [f"base={policy}", f"tuned={policy},{adapter}", f"same={policy}"],
        "queries": queries(place / "queries.jsonl", 6),
        "output": place / "out",
        "samples": 2,
        "engine": "hf",
        "max_new_tokens": 12,
    }


@pytest.fixture(scope="module")
def report(inputs: dict) -> EvalReport:
    return evaluate(Evaluate(**inputs))


@pytest.fixture(scope="module")
def models(policy: Path, adapter: Path) -> dict:
    base = AutoModelForCausalLM.from_pretrained(policy).double().eval()
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy), adapter).double().eval()
    return {"base": base, "tuned": tuned, "same": base}


def means(report: EvalReport, label: str) -> dict[str, float]:
    metrics = next(policy.metrics for policy in report.policies if policy.label == label)
    return {name: estimate.mean for name, estimate in metrics.items()}


def stored(output: Path, label: str) -> list[dict]:
    return [row for row in read_table(output / "eval.parquet", "evaluation").to_pylist() if row["label"] == label]


def sampled(output: Path) -> dict[tuple[str, str, int], tuple[list[int], list[int]]]:
    """Token ids of x and y by policy, query and sample, as the engine left them."""
    found = {}
    for folder in (output / "answers").iterdir():
        for row in Store(folder).scan("answers").collect().to_dicts():
            found[row["policy"], row["query_id"], row["sample"]] = (row["x_ids"], row["y_ids"])
    return found


def logps(model, x: list[int], y: list[int]) -> list[float]:
    with torch.no_grad():
        table = model(torch.tensor([x + y])).logits[0].log_softmax(-1)
    return [table[len(x) + at - 1, token].item() for at, token in enumerate(y)]


def test_kl_and_entropy_are_those_of_a_plain_loop_in_float64(report, inputs: dict, models: dict) -> None:
    ids = sampled(inputs["output"])
    for label in models:
        kl, entropy, tokens, under_first = 0.0, 0.0, 0, 0.0
        rows = stored(inputs["output"], label)
        assert len(rows) == 12
        for row in rows:
            x, y = ids[row["policy"], row["query_id"], row["sample"]]
            own, first = (math.fsum(logps(models[name], x, y)) for name in (label, "base"))
            assert row["own_logps"] == pytest.approx(own, rel=1e-5)
            assert row["first_logps"] == pytest.approx(first, rel=1e-5)
            kl, entropy, tokens, under_first = kl + own - first, entropy - own, tokens + len(y), under_first + first
        found = means(report, label)
        assert found["kl"] == pytest.approx(kl / 12, abs=1e-5)
        assert found["entropy"] == pytest.approx(entropy / tokens, rel=1e-5)
        assert found["mean_logps_first"] == pytest.approx(under_first / tokens, rel=1e-5)


def test_the_first_policy_is_at_0_and_so_is_another_of_the_same_bytes(report, inputs: dict) -> None:
    for place in (0, 2):
        kl = report.policies[place].metrics["kl"]
        assert (kl.mean, kl.low, kl.high, kl.count) == (0, 0, 0, 6)
    tuned = report.policies[1].metrics["kl"]
    assert tuned.low > 0
    [less] = [c.difference for c in report.comparisons if (c.label, c.baseline, c.metric) == ("tuned", "base", "kl")]
    assert (less.mean, less.low, less.high) == (tuned.mean, tuned.low, tuned.high)


def test_on_many_samples_they_are_the_exact_ones(policy, adapter, models: dict, tmp_path: Path) -> None:
    """One token a response, so that both are sums over the vocabulary: sum p log(p / q) and - sum p log p."""
    samples, count = 200, 4
    source = queries(tmp_path / "queries.jsonl", count)
    given = {"policy": [f"base={policy}", f"tuned={policy},{adapter}"], "queries": source, "samples": samples}
    found = evaluate(Evaluate(**given, output=tmp_path / "out", engine="hf", max_new_tokens=1))
    xs = {query: x for (_, query, _), (x, _) in sampled(tmp_path / "out").items()}
    exact, variances = {"kl": 0.0, "entropy": 0.0}, {"kl": 0.0, "entropy": 0.0}
    for x in xs.values():
        with torch.no_grad():
            log_p, log_q = (models[name](torch.tensor([x])).logits[0, -1].log_softmax(-1) for name in ("tuned", "base"))
        for name, value in (("kl", log_p - log_q), ("entropy", -log_p)):
            mean = (log_p.exp() * value).sum().item()
            exact[name] += mean / count
            variances[name] += ((log_p.exp() * value**2).sum().item() - mean**2) / samples / count**2
    tuned = means(found, "tuned")
    assert exact["kl"] > 0.1
    for name, value in exact.items():
        assert tuned[name] == pytest.approx(value, abs=4 * math.sqrt(variances[name]))
        assert math.sqrt(variances[name]) < 0.1 * value


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 9}, {"min_p": 0.1}])
def test_other_draws_than_the_policys_own_have_neither(
    change: dict, inputs: dict, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(ple_train.measure.perplexity, "load_policy", refuse)
    found = evaluate(Evaluate(**inputs | change | {"policy": inputs["policy"][:2], "output": tmp_path / "out"}))
    sentence = (
        "No KL and no entropy: responses of base, tuned are not known to be drawn at --temperature 1, without --top-p, "
        "--top-k, --min-p and --repetition-penalty"
    )
    assert not DIVERGENCE & means(found, "base").keys()
    assert found.left_out == [sentence]
    assert sentence in format_report(found)
    assert sentence in capsys.readouterr().err
    assert stored(tmp_path / "out", "base")[0]["own_logps"] is None


def refuse(*_, **__):
    raise AssertionError("computed again")


def test_stopped_between_two_likelihoods_it_goes_on(report, inputs: dict, tmp_path, monkeypatch) -> None:
    computed: list[bytes] = []
    compute = ple_train.measure.perplexity.negative_log_likelihoods

    def noted(policy, sequences, tokens):
        for batch in compute(policy, sequences, tokens):
            if len(computed) >= 17 and b"" not in computed:
                computed.append(b"")
                raise KeyboardInterrupt
            computed.extend(type(policy.model).__name__.encode() + sequences[at].ids.tobytes() for at, _ in batch)
            yield batch

    monkeypatch.setattr(ple_train.measure.perplexity, "negative_log_likelihoods", noted)
    given = inputs | {"output": tmp_path / "out", "microbatch_tokens": 40}
    with pytest.raises(KeyboardInterrupt):
        evaluate(Evaluate(**given))
    again = evaluate(Evaluate(**given))
    computed.remove(b"")
    assert len(computed) == 12 + 24  # of tuned its own, of base its own and those of tuned; of same nothing
    for label in ("base", "tuned", "same"):
        assert means(again, label) == pytest.approx(means(report, label), rel=1e-5)
    monkeypatch.setattr(ple_train.measure.perplexity, "load_policy", refuse)
    assert evaluate(Evaluate(**given)) == again


def test_responses_of_a_store_give_the_same_numbers(report, inputs: dict, tmp_path: Path) -> None:
    data = tuple((inputs["output"] / "answers").iterdir())
    found = evaluate(Evaluate(policy=inputs["policy"], data=data, output=tmp_path / "out"))
    for label in ("base", "tuned", "same"):
        assert means(found, label) == pytest.approx(means(report, label), rel=1e-5)


@pytest.mark.parametrize("kind", ["answers", "responses", "pairs"])
@pytest.mark.parametrize("sampling", [{"temperature": 0.7, "top_p": 1.0}, {"temperature": 1.0, "top_p": 0.5}, None, 1])
def test_responses_that_were_drawn_otherwise_or_nobody_knows_how(kind, sampling, policy, adapter, tmp_path) -> None:
    """One policy as it is, the other not: the sentence names the other."""
    store = Store(tmp_path / "data")
    store.commit(kind, 0, "00000-aa", table(kind, [{"policy": policy_name(policy)}]), AS_IS)
    rows = table(kind, [{"policy": policy_name(policy, adapter)}], 1)
    store.commit(kind, 1, "00000-aa", rows, {} if sampling is None else {"sampling": sampling})
    given = {"policy": [f"a={policy}", f"b={policy},{adapter}"], "data": [store.root], "output": tmp_path / "out"}
    found = evaluate(Evaluate(**given))
    assert not DIVERGENCE & means(found, "a").keys()
    assert "responses of b are not known to be drawn" in found.left_out[0]
    alone = evaluate(Evaluate(**given | {"policy": given["policy"][:1]}))
    assert means(alone, "a")["kl"] == 0
    assert not alone.left_out


def test_an_empty_response_has_no_tokens_and_counts_as_one(policy: Path, adapter: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "data")
    for t, name in enumerate([policy_name(policy), policy_name(policy, adapter)]):
        rows = [{"policy": name}, {"policy": name, "y": "", "y_ids": [], "y_empty": True}]
        store.commit("answers", t, "00000-aa", table("answers", rows, t), AS_IS)
    given = {"policy": [f"a={policy}", f"b={policy},{adapter}"], "data": [store.root]}
    found = evaluate(Evaluate(**given, output=tmp_path / "out"))
    full, empty = stored(tmp_path / "out", "b")
    assert (empty["own_logps"], empty["first_logps"]) == (0, 0)
    assert means(found, "b")["kl"] == pytest.approx((full["own_logps"] - full["first_logps"]) / 2)
    assert means(found, "b")["entropy"] == pytest.approx(-full["own_logps"] / 3)
    nothing = Store(tmp_path / "nothing")
    rows = [{"policy": policy_name(policy), "y": "", "y_ids": [], "query_id": id} for id in "ab"]
    nothing.commit("answers", 0, "00000-aa", table("answers", rows), AS_IS)
    found = evaluate(Evaluate(policy=[f"a={policy}"], data=[nothing.root], output=tmp_path / "none"))
    assert (means(found, "a")["kl"], means(found, "a")["entropy"]) == (0, 0)


def test_a_policy_with_other_tokens_has_an_entropy_and_no_kl(policy: Path, tmp_path: Path, capsys) -> None:
    other = tiny.policy_of(tmp_path / "other", tiny.tiny_tokenizer(special=("<|more|>",)))
    short = Path(shutil.copytree(policy, tmp_path / "short"))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 9}))
    source = queries(tmp_path / "queries.jsonl", 3)
    given = {"queries": source, "engine": "hf", "max_new_tokens": 5, "limit": 1}
    for first, second in ((policy, other), (other, policy)):
        found = evaluate(Evaluate(policy=[f"a={first}", f"b={second}"], output=tmp_path / "out", **given))
        assert DIVERGENCE & means(found, "b").keys() == {"entropy"}
        assert found.left_out == ["No KL: a has other tokens, or fewer positions, than b"]
        assert found.left_out[0] in capsys.readouterr().err
    store = Store(tmp_path / "data")
    for t, (model, ids) in enumerate([(short, [8, 9, 1]), (policy, [8] * 7)]):
        store.commit("answers", t, "0", table("answers", [{"policy": policy_name(model), "y_ids": ids}], t), AS_IS)
    found = evaluate(Evaluate(policy=[f"a={short}", f"b={policy}"], data=[store.root], output=tmp_path / "short-out"))
    assert found.left_out == ["No KL: a has other tokens, or fewer positions, than b"]


def test_a_model_that_only_an_engine_reads_is_still_compared(policy: Path, tmp_path: Path) -> None:
    """A quantized one: its rewards and lengths are measured as before there was a KL."""
    quantized = Path(shutil.copytree(policy, tmp_path / "quantized"))
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    store = Store(tmp_path / "data")
    store.commit("answers", 0, "0", table("answers", [{"policy": policy_name(policy)}]), AS_IS)
    store.commit("answers", 1, "0", table("answers", [{"policy": policy_name(quantized)}], 1), AS_IS)
    given = {"policy": [f"a={policy}", f"b={quantized}"], "data": [store.root], "output": tmp_path / "out"}
    found = evaluate(Evaluate(**given))
    assert means(found, "b")["length"] == 3
    assert not DIVERGENCE & means(found, "b").keys()
    assert len(found.left_out) == 1
    assert found.left_out[0].startswith(f"No KL and no entropy: {quantized} is quantized (GPTQ): give the model in")


def test_the_table_says_what_they_are(report) -> None:
    text = format_report(report)
    assert max(map(len, text.splitlines()[1:])) <= WIDTH
    assert "KL          to base, in nats a response" in text
    assert "entropy     in nats a token" in text
    assert f"{report.policies[1].metrics['kl'].mean:.2f} [" in text


def test_a_report_of_an_older_program_is_read(report) -> None:
    old = json.loads(report.to_json()) | {"version": 1}
    del old["left_out"]
    assert EvalReport.model_validate_json(json.dumps(old)).left_out == []
