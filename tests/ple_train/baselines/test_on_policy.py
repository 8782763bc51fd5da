"""On-policy context distillation on tiny real models: prompts as sampled, the loss by the oracle, training, resume."""

import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import polars as pl
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import cli
from ple_data.engines.hf import HfEngine
from ple_data.inputs.principles import load_principle
from ple_data.rewards import load_reward_model
from ple_data.sampling import terms
from ple_data.sampling.generate import generate
from ple_data.scoring.score import score
from ple_data.storage.store import Store
from ple_train.baselines import responses as baselines
from ple_train.model.batches import MicroBatch, micro_batches
from ple_train.model.policy import Policy, load_policy
from ple_train.objectives.distillation import DistillationObjective
from ple_train.run import rounds
from ple_train.snapshot import freeze
from schemas.errors import UsageError
from schemas.options import ContextDistillation, Gen, Rewards
from schemas.recipe import parse_recipe
from tests import oracle, tiny
from tests.conftest import ROOT
from tests.tables import table

TEXTS = [{"id": f"q{at}", "x": x} for at, x in enumerate(tiny.corpus()[:12])]
CHATS = [
    {"id": "user", "messages": [{"role": "user", "content": "Was the film good?"}]},
    {"id": "system", "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Üben?"}]},
    {
        "id": "turns",
        "messages": [{"role": role, "content": role[::-1]} for role in ("user", "assistant", "user")],
    },
]
SPECIAL = ("<|turn|>", "<|over|>")
OWN_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|turn|>system\nBe brief.<|over|>\n{% endif %}" + tiny.TURNS
DATED = "<|turn|>system\n{{ strftime_now('%d %b %Y') }}<|over|>\n" + tiny.TURNS


def sampled(folder: Path, model: Path, queries: list[dict], **more) -> Path:
    """Round 0 as ple-gen and ple-score leave it → DATA."""
    (folder / "q.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    (folder / "letters.py").write_text("def score(xs, ys):\n    return [float(y.count('e')) for y in ys]\n")
    asked = {"principles": "imdb", "round": 0, "max_new_tokens": 8, "engine": "hf", "unit_size": 5, "samples": 2}
    generate(Gen(model=str(model), queries=str(folder / "q.jsonl"), data=folder / "data", **{**asked, **more}))
    score(Store(folder / "data"), load_reward_model(f"{folder / 'letters.py'}:score", Rewards()))
    return folder / "data"


@pytest.fixture(scope="module")
def pairs(policy, tmp_path_factory) -> Path:
    return sampled(tmp_path_factory.mktemp("on-policy"), policy, TEXTS)


@pytest.fixture
def run(policy, pairs, tmp_path):
    """Train into tmp_path/NAME with small defaults → the directory."""

    def run(name: str = "out", **more) -> Path:
        options = {"model": str(policy), "data": [pairs], "round": 0, "learning_rate": 1e-3, "on_policy": True, **more}
        baselines.baseline("context-distillation", ContextDistillation(output=tmp_path / name, **options))
        return tmp_path / name

    return run


def metrics(output: Path) -> pl.DataFrame:
    return pl.read_parquet(output / "metrics.parquet")


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def rows(data: Path) -> list[dict]:
    return Store(data).scan("pairs").collect().to_dicts()


def sequences(model: Path, data: Path, limits) -> list:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return baselines.choose(baselines.ON_POLICY, freeze([data], 0, None), None, tokenizer, limits)


# --- [p, x] is what was sampled from -------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch) -> set[tuple[str, tuple[int, ...]]]:
    """(arm, prompt ids) of every request that the engine gets for a round."""
    found = set()
    original = HfEngine.sample

    def watched(self, units, sampling):
        def noted():
            for unit in units:
                found.update((request.key[2], tuple(request.prompt_ids)) for request in unit if request.key)
                yield unit

        return original(self, noted(), sampling)

    monkeypatch.setattr(HfEngine, "sample", watched)
    return found


OWN = {"chat": OWN_SYSTEM, "special": SPECIAL}
FORMS = {
    "plain": ({}, {}, TEXTS),
    "plain with BOS": ({"add_bos": True}, {}, TEXTS),
    "chat": ({"chat": True, "add_bos": True}, {}, TEXTS),
    "dialogues": ({"chat": True, "add_bos": True}, {}, CHATS),
    "a chat's model asked in plain text": ({"chat": True, "add_bos": True}, {"prompt_format": "plain"}, TEXTS),
    "no system message": ({"chat": "no-system"}, {}, CHATS[::2]),
    "own system message": (OWN, {}, CHATS),
    "own system message replaced": (OWN, {"principle_form": "replace"}, CHATS),
    "a system message of the round": ({"chat": True, "add_bos": True}, {"system": 'Be "brave".'}, CHATS),
    "the template told": (OWN, {"system": "", "chat_template_arg": ["role=1"]}, TEXTS),
    "dated": ({"chat": DATED, "special": SPECIAL}, {}, CHATS),
    "no principle": ({}, {"principles": "none"}, TEXTS),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_prompts_are_those_that_the_engine_sampled_from(form, seen, tmp_path, monkeypatch):
    """Long after: the day on which it trains is another one than that of the round."""
    made, options, queries = FORMS[form]
    model = tiny.policy_of(tmp_path / "model", tiny.tiny_tokenizer(**made))

    class Then(date):
        @classmethod
        def today(cls):
            return date(2001, 2, 3)

    with monkeypatch.context() as patch:
        patch.setattr(terms, "date", Then)
        data = sampled(tmp_path, model, queries, max_query_tokens=2000, max_new_tokens=4, **options)
    taken = sequences(model, data, load_policy(str(model)))
    assert len(taken) == 2 * len(queries)
    assert {("y", tuple(s.ids[: s.prompt].tolist())) for s in taken} == {key for key in seen if key[0] == "y"}
    found = {("y_prompt", tuple(s.beside.ids[: s.beside.prompt].tolist())) for s in taken}
    assert found == {key for key in seen if key[0] == "y_prompt"}
    for s in taken:
        assert s.beside.ids[s.beside.prompt :].tolist() == s.ids[s.prompt :].tolist()
        assert (s.beside.ids.tolist() == s.ids.tolist()) == (form == "no principle")


def test_a_round_whose_prompts_do_not_come_out_again_is_refused(run, tmp_path):
    """Its ids are of no text that it holds."""
    Store(tmp_path / "foreign").commit("pairs", 0, "00000-0", table("pairs", [{}]), {})
    with pytest.raises(UsageError, match=r"other prompts of its queries than were sampled from, so \[p, x\] is not"):
        run(data=[tmp_path / "foreign"])


def test_a_first_token_without_context_is_trained_after_neither_prompt(policy, tmp_path, monkeypatch):
    """An x that the tokenizer makes no ids of: what is left of the response is the same in both places."""
    monkeypatch.setattr(baselines, "rendered_again", lambda tokenizer, xs, *_: ([[] for _ in xs], [[9, 8] for _ in xs]))
    Store(tmp_path).commit("pairs", 0, "00000-0", table("pairs", [{"x_ids": []}]), {})
    (found,) = sequences(policy, tmp_path, load_policy(str(policy)))
    assert (found.response, found.beside.response) == (2, 2)
    assert (found.ids.tolist(), found.beside.ids.tolist()) == ([8, 9, 1], [9, 8, 8, 9, 1])


# --- the loss ------------------------------------------------------------------------------------------------------


def next_token(model, x: list[int], y: list[int]) -> list[list[float]]:
    """The logits from which the plain model predicts each id of y."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([x + y])).logits[0, len(x) - 1 : -1].tolist()


def test_the_loss_is_the_oracles_kl_a_token_of_the_plain_models_logits(run, policy, adapter, pairs):
    """It goes on from an adapter: the teacher is the start policy, without it."""
    output = run(adapter=str(adapter), batch_size=100)
    start = AutoModelForCausalLM.from_pretrained(policy).double().eval()
    begun = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy), adapter).double().eval()
    tokenizer, p = AutoTokenizer.from_pretrained(policy), load_principle("imdb").text
    now, before = [], []
    for row in rows(pairs):
        y, guided = row["y_ids"], tokenizer(f"{p}\n{row['x']}").input_ids
        teacher = next_token(start, guided, y)
        with_x = (next_token(model, row["x_ids"], y) for model in (begun, start))
        for found, student in zip((now, before), with_x, strict=True):
            found += [oracle.reverse_kl(*pair) for pair in zip(student, teacher, strict=True)]
    assert metrics(output)["loss"][0] == pytest.approx(sum(now) / len(now), rel=1e-4)
    assert metrics(output)["kl_start"][0] == pytest.approx(sum(before) / len(before), rel=1e-4)
    assert metrics(output)["trained_tokens"][0] == len(now)
    record = json.loads((output / "ple.json").read_text())
    assert (record["kind"], record["settings"]["method"]) == ("baseline", "context-distillation")
    assert record["settings"]["on_policy"] is True
    assert (record["cost"]["tokens_sampled"], record["cost"]["tokens_trained"]) == (len(now), len(now))


@pytest.fixture
def begun(policy, adapter) -> Policy:
    return load_policy(str(policy), adapter=str(adapter))


def gradient(begun: Policy, taken: list, budget: int, layout: str = "packed") -> tuple[float, dict[str, torch.Tensor]]:
    begun.layout = layout
    objective = DistillationObjective(begun)
    begun.zero_grad()
    total = 0.0
    for batch in micro_batches(taken, sum(s.response for s in taken), budget, 1, 0, layout=layout):
        loss, _ = objective(begun, batch, 1)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in begun.trainable().items()}


@pytest.mark.parametrize(("budget", "layout"), [(1, "packed"), (400, "packed"), (400, "shared"), (10**6, "padded")])
def test_loss_and_gradient_do_not_depend_on_micro_batches_and_layout(begun, policy, pairs, budget, layout):
    """One by one, in several, and at once, in rows that share no attention."""
    taken = sequences(policy, pairs, begun)
    whole, expected = gradient(begun, taken, 10**6)
    found, grads = gradient(begun, taken, budget, layout)
    assert found == pytest.approx(whole, rel=1e-5)
    assert any(grad.abs().max() > 1e-4 for grad in expected.values())
    torch.testing.assert_close(grads, expected, rtol=1e-3, atol=2e-6)


def test_padding_of_both_is_counted(begun, policy, pairs):
    """(x, y) and (p, x, y) are padded to the longest of each."""
    begun.layout = "padded"
    objective = DistillationObjective(begun)
    taken = sequences(policy, pairs, begun)
    _, sums = objective(begun, MicroBatch(taken, 1), 1)
    lengths = [len(s.ids) for s in taken], [len(s.beside.ids) for s in taken]
    share = sum(map(sum, lengths)) / sum(len(taken) * max(of) for of in lengths)
    found = objective.summarise(dict(zip(objective.sums, sums.tolist(), strict=True)))
    assert found == {"kl_start": None, "useful_token_share": share, "trained_tokens": sum(s.response for s in taken)}


def test_a_micro_batch_counts_what_is_beside_a_sequence(policy, pairs, begun):
    taken = sequences(policy, pairs, begun)
    for batch in micro_batches(taken, 1, 700, 1, 0, layout="shared"):
        assert sum(len(s.ids) + len(s.beside.ids) for s in batch.sequences) <= 700


# --- training ------------------------------------------------------------------------------------------------------


def test_training_takes_the_principle_in(run):
    """KL a token falls to a part of the start policy's, at tokens that the start policy sampled."""
    found = metrics(run(epochs=12, batch_size=12, learning_rate=5e-3))
    assert found["loss"][0] == pytest.approx(found["kl_start"][0], rel=1e-5)
    assert found["loss"][-1] < 0.6 * found["loss"][0]
    assert found["kl_start"].is_null().to_list() == [step % 10 != 0 for step in range(24)]
    assert (found["loss"] >= 0).all()


def test_a_high_learning_rate_leaves_it_finite(run):
    found = metrics(run(epochs=10, batch_size=4, learning_rate=1e-2))
    assert found["loss"].is_finite().all()
    assert found["grad_norm"].is_finite().all()


def test_without_the_option_it_is_sft_on_y_prompt_as_before(run, pairs):
    output = run(on_policy=False, batch_size=100)
    assert "kl_start" not in metrics(output).columns
    assert metrics(output)["trained_tokens"][0] == sum(len(row["y_prompt_ids"]) for row in rows(pairs))


def test_killed_and_resumed_is_the_same_to_the_bit(run, monkeypatch):
    options = {"batch_size": 5, "epochs": 3, "checkpoint_every": 2}
    whole = run("whole", **options)
    original, calls = DistillationObjective.__call__, iter(range(100))
    with monkeypatch.context() as patch:

        def stop(self, model, batch, step):
            if next(calls) == 7:
                raise KeyboardInterrupt
            return original(self, model, batch, step)

        patch.setattr(DistillationObjective, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            run("resumed", **options)
    resumed = run("resumed", **options)
    for name, expected in weights(whole).items():
        assert torch.equal(weights(resumed)[name], expected)
    same = ("loss", "kl_start", "trained_tokens", "useful_token_share")
    assert metrics(resumed).select(same).equals(metrics(whole).select(same))
    with pytest.raises(UsageError, match="on_policy: True then, False now"):
        run("resumed", **options, on_policy=False)


def test_two_processes_equal_one(run, policy, pairs, tmp_path):
    alone = run("alone", batch_size=8)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517", "-m", "cli"]
    command += ["baseline", "context-distillation", "--on-policy", "--model", policy, "--data", pairs, "--round", "0"]
    command += ["--output", tmp_path / "two", "--learning-rate", "1e-3", "--batch-size", "8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(weights(tmp_path / "two"), weights(alone), rtol=0, atol=1e-5)
    for column in ("loss", "kl_start"):
        one, two = (metrics(path)[column].drop_nulls().to_list() for path in (alone, tmp_path / "two"))
        assert two == pytest.approx(one, rel=1e-4)


def test_it_takes_the_newest_round_alone_and_says_where_another_policy_sampled_it(
    run, policy, pairs, adapter, tmp_path
):
    """Round 1 alone is there: no older one is asked for."""
    (shard,) = [s for s in Store(pairs).shards("pairs") if s.unit.startswith("00000")]
    newer = Store(pairs).read(shard).to_pylist()
    rows_of_round_1 = table("pairs", [row | {"round": 1} for row in newer], 1)
    Store(tmp_path / "newer").commit("pairs", 1, "00000-1", rows_of_round_1, Store(pairs).provenance(shard))
    output = run(data=[tmp_path / "newer"], round=1, batch_size=100)
    assert metrics(output)["trained_tokens"][0] == sum(len(row["y_ids"]) for row in newer)


def test_a_round_of_another_policy_is_said(run, adapter, capsys):
    run(adapter=str(adapter))
    assert "is --adapter missing, or of another round?" in capsys.readouterr().err


def test_rows_that_are_too_long_with_the_principle_are_left_out(run, policy, pairs, capsys):
    """The longest of [p, x, y] counts."""
    tokenizer, p = AutoTokenizer.from_pretrained(policy), load_principle("imdb").text
    lengths = [len(tokenizer(f"{p}\n{row['x']}").input_ids) + len(row["y_ids"]) for row in rows(pairs)]
    output = run(max_length=max(lengths) - 1, batch_size=100)
    longest = lengths.count(max(lengths))
    assert f"{longest} responses left out: empty, or longer than --max-length" in capsys.readouterr().err
    kept = [len(row["y_ids"]) for row, length in zip(rows(pairs), lengths, strict=True) if length < max(lengths)]
    assert metrics(output)["trained_tokens"][0] == sum(kept)


def test_a_prompt_that_is_over_the_models_positions_is_named(run, pairs, tmp_path):
    model = tiny.tiny_policy(tmp_path / "short", max_position_embeddings=60)
    with pytest.raises(UsageError, match=r"x and response with the principle have .* over the 60 positions"):
        run(model=str(model))


def test_all_weights_have_no_start_policy(run, tmp_path):
    with pytest.raises(UsageError, match=r"--on-policy needs the start policy: .* so not with --full"):
        run(full=True)
    assert not (tmp_path / "out").exists()


# --- the recipe ----------------------------------------------------------------------------------------------------


def recipe(**baseline) -> dict:
    keys = {"model": "m", "queries": "q", "principles": "hh", "reward_model": "r", "run_dir": "run", "rounds": 1}
    return {**keys, "baseline": baseline}


def test_a_recipe_asks_for_it():
    stages = rounds.plan(parse_recipe(recipe(method="context-distillation", on_policy=True), "test"))
    words = list(stages[2].command[1:])
    assert words[:3] == ["baseline", "context-distillation", "--on-policy"]
    context = cli.baseline.commands["context-distillation"].make_context("context-distillation", words[2:])
    assert context.params["on_policy"] is True
    plain = rounds.plan(parse_recipe(recipe(method="context-distillation"), "test"))
    assert not {"--on-policy", "--no-on-policy"} & set(plain[2].command)


@pytest.mark.parametrize("method", ["raft", "dpo", "sft"])
def test_a_recipe_for_another_method_refuses_it(method):
    with pytest.raises(UsageError, match=f"on_policy is no option of {method}"):
        parse_recipe(recipe(method=method, on_policy=True), "test")
