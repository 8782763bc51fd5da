"""Baselines and ablations on tiny real models: what each chooses, its loss by the oracle, resume, cost, the recipe."""

import importlib.metadata
import json
import math
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer

import cli
from ple_data import selection
from ple_data.common.digests import text_digest
from ple_data.common.progress import Progress
from ple_data.rewards.endpoint import HttpReward
from ple_data.sampling.thoughts import Thoughts
from ple_data.storage.store import Store
from ple_train import sft as sft_room
from ple_train import train as training
from ple_train.baselines import dpo as dpo_room
from ple_train.baselines import ppo as ppo_room
from ple_train.baselines import responses as baselines
from ple_train.baselines.trl_tools import VERSIONS, require_trl
from ple_train.engine.session import Session
from ple_train.objectives.responses import SftObjective
from ple_train.run import rounds
from ple_train.snapshot import freeze
from ple_train.stream import PairStream
from schemas.errors import PleError, UsageError
from schemas.options import Baseline, BaselineSft, Dpo, Ppo, Train, Trainable
from schemas.recipe import parse_recipe
from tests import oracle, tiny
from tests.conftest import ROOT
from tests.tables import table


def frame(rows: list[dict], round: int = 0) -> pl.DataFrame:
    return pl.DataFrame(pl.from_arrow(table("pairs", rows, round)))


# --- what is chosen ------------------------------------------------------------------------------------------------

FOUR = [
    {"query_id": "a", "x": "A?", "sample": 0, "y": "a0", "y_prompt": "A0", "s": 1.0, "s_prompt": 2.0},
    {"query_id": "a", "x": "A?", "sample": 1, "y": "a1", "y_prompt": "A1", "s": 3.0, "s_prompt": -1.0},
    {"query_id": "b", "x": "B?", "sample": 0, "y": "b0", "y_prompt": "B0", "s": 0.5, "s_prompt": 0.5},
    {"query_id": "b", "x": "B?", "sample": 1, "y": "b1", "y_prompt": "B1", "s": 0.5, "s_prompt": 0.25},
]


def test_raft_takes_the_best_of_all_samples_and_arms_the_first_of_equals():
    found = selection.best_of_n(frame(FOUR)).sort("query_id")
    assert found.select("query_id", "y", "reward", "n").rows() == [("a", "a1", 3.0, 4), ("b", "b0", 0.5, 4)]


def test_raft_chooses_in_each_round_apart():
    both = pl.concat([frame(FOUR[:1], 0), frame(FOUR[1:2], 1)])
    assert sorted(selection.best_of_n(both).select("round", "y").rows()) == [(0, "A0"), (1, "a1")]


def test_preferences_choose_by_reward_and_drop_ties():
    found = selection.preferences(frame(FOUR))
    expected = [("A0", "a0", 2.0, 1.0), ("a1", "A1", 3.0, -1.0), ("b1", "B1", 0.5, 0.25)]
    assert found.select("chosen", "rejected", "chosen_reward", "rejected_reward").rows() == expected
    assert found["chosen_ids"].to_list() == [[10, 11, 12, 1], [8, 9, 1], [8, 9, 1]]
    assert found["rejected_ids"].to_list() == [[8, 9, 1], [10, 11, 12, 1], [10, 11, 12, 1]]


def test_context_distillation_takes_y_prompt_and_sft_each_reference_once():
    rows = frame([{**row, "reference": f"ref {row['query_id']}"} for row in FOUR[:3]] + [FOUR[3] | {"query_id": "c"}])
    assert selection.guided(rows)["y"].to_list() == ["A0", "A1", "B0", "B1"]
    assert selection.references(rows).select("query_id", "y").rows() == [("a", "ref a"), ("b", "ref b")]


# --- stores and what is expected of them ---------------------------------------------------------------------------


def row(number: int, s: float, s_prompt: float, **more) -> dict:
    """A pair whose ids differ from those of every other number."""
    return {
        "query_id": f"q{number}",
        "x_ids": [5, 6, 10 + number],
        "y_ids": [20 + number, 40, 41][: 1 + number % 3],
        "y_prompt_ids": [60 + number, 80, 81, 82][: 1 + number % 4],
        "s": s,
        "s_prompt": s_prompt,
        "reference": " great." if number % 2 else " very bad.",
        **more,
    }


ROUNDS = [
    [row(n, s, s_prompt) for n, (s, s_prompt) in enumerate([(0.0, 1.0), (0.5, 0.25), (1.0, 1.1), (2.0, 2.0)])],
    [row(n + 4, s, s_prompt) for n, (s, s_prompt) in enumerate([(-1.0, 1.0), (0.5, -0.25)])],
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("baselines") / "data"
    for round, rows in enumerate(ROUNDS):
        for at, one in enumerate(rows):
            Store(root).commit("pairs", round, f"{at:05d}-{round:012x}", table("pairs", [one], round), {})
    return root


@pytest.fixture
def run(policy, pairs, tmp_path):
    """Train a baseline into tmp_path/NAME with small defaults → the directory."""

    def run(method: str, name: str = "out", **more) -> Path:
        options = {"model": str(policy), "data": [pairs], "round": 1, "learning_rate": 1e-3, **more}
        if method == "dpo":
            dpo_room.dpo(Dpo(output=tmp_path / name, **{"via": "trl"} | options))
        else:
            kind = BaselineSft if method == "sft" else Baseline
            baselines.baseline(method, kind(output=tmp_path / name, **options))
        return tmp_path / name

    return run


def logps(model, x: list[int], y: list[int]) -> list[float]:
    """log pi of each id of y given x, by the plain model in float64."""
    ids = torch.tensor(x + y)
    with torch.no_grad():
        scores = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return scores[len(x) - 1 : -1].gather(1, ids[len(x) :, None]).squeeze(1).tolist()


@pytest.fixture(scope="module")
def plain(policy):
    return AutoModelForCausalLM.from_pretrained(policy).double().eval()


def first_loss(output: Path) -> float:
    return pl.read_parquet(output / "metrics.parquet")["loss"][0]


def record(output: Path) -> dict:
    return json.loads((output / "ple.json").read_text())


# --- the methods that are Eq. 1 ------------------------------------------------------------------------------------


def expected_responses(method: str, tokenizer) -> list[tuple[list[int], list[int]]]:
    """(x, response) ids of a method, by hand from ROUNDS."""
    if method == "context-distillation":
        return [(r["x_ids"], r["y_prompt_ids"]) for rows in ROUNDS for r in rows]
    if method == "raft":
        return [(r["x_ids"], r["y_prompt_ids"] if r["s_prompt"] > r["s"] else r["y_ids"]) for r in ROUNDS[1]]
    references = [(r["x_ids"], r["reference"]) for rows in ROUNDS for r in rows]
    return [(x, [*tokenizer(text).input_ids, tokenizer.eos_token_id]) for x, text in references]


@pytest.mark.parametrize("method", ["sft", "context-distillation", "raft"])
def test_the_loss_is_eq_1_on_the_chosen_responses(run, plain, policy, method):
    output = run(method, batch_size=100)
    chosen = expected_responses(method, AutoTokenizer.from_pretrained(policy))
    tokens = sum(len(y) for _, y in chosen)
    expected = oracle.sft_loss([logps(plain, x, y) for x, y in chosen]) / tokens
    assert first_loss(output) == pytest.approx(expected, rel=1e-5)
    assert record(output)["kind"] == "baseline"
    assert record(output)["settings"]["method"] == method
    assert record(output)["machine"]["precision"] == "float32"
    sampled = {
        "sft": (0, 0),
        "context-distillation": tuple(sum(len(r["y_prompt_ids"]) for r in ROUNDS[t]) for t in (1, 0)),
        "raft": (sum(len(r["y_ids"]) + len(r["y_prompt_ids"]) for r in ROUNDS[1]), 0),
    }[method]
    cost = record(output)["cost"]
    assert (cost["tokens_sampled"], cost["tokens_reused"], cost["tokens_trained"]) == (*sampled, tokens)
    assert cost["seconds"] > 0


def test_sft_takes_files_and_goes_on_from_an_adapter(run, adapter, plain, policy, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"x": "the film", "y": " great."}\n')
    output = run("sft", data=[rows], round=None, adapter=str(adapter), learning_rate=1e-9)
    tuned = load_file(adapter / "adapter_model.safetensors")
    for name, found in load_file(output / "adapter_model.safetensors").items():
        torch.testing.assert_close(found, tuned[name], rtol=0, atol=1e-6)
    with pytest.raises(UsageError, match="not both"):
        run("sft", "both", data=[rows, tmp_path])
    with pytest.raises(UsageError, match="--round is missing"):
        run("raft", "none", round=None)


def test_a_data_file_that_is_not_there_is_named(run, tmp_path):
    with pytest.raises(UsageError, match=r"typo\.jsonl: no such file or folder"):
        run("sft", data=[tmp_path / "typo.jsonl"], round=None)


def test_rows_of_a_file_are_rendered_as_asked(chat_policy, tmp_path):
    """Prompts do not train: the response's tokens are the same, what stands before them is not."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"x": "the film", "y": " great."}\n')
    losses = {}
    for prompt_format in ("auto", "chat", "plain"):
        baselines.baseline(
            "sft",
            BaselineSft(
                model=str(chat_policy),
                data=[rows],
                output=tmp_path / prompt_format,
                prompt_format=prompt_format,
            ),
        )
        losses[prompt_format] = first_loss(tmp_path / prompt_format)
    assert losses["auto"] == losses["chat"] != losses["plain"]


def test_a_stores_prompts_are_not_rendered_anew(run):
    with pytest.raises(UsageError, match="--chat-template-arg go with files"):
        run("sft", prompt_format="plain")


def test_references_that_are_too_long_are_counted_whatever_the_pairs_length(run, policy, capsys):
    """x has 3 ids, the references have 3 and 4 with their end; the pairs' own responses do not count."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    short, long = sorted(3 + len(tokenizer(text).input_ids) + 1 for text in (" great.", " very bad."))
    assert short < long
    trained = record(run("sft", max_length=short))["cost"]["tokens_trained"]
    assert trained == 3 * (short - 3)
    assert f"3 responses left out: empty, or longer than --max-length {short}" in capsys.readouterr().err


def two_stores(tmp_path: Path, rows: list[dict], others: list[dict], round: int = 0) -> list[Path]:
    for name, content in (("one", rows), ("two", others)):
        Store(tmp_path / name).commit("pairs", round, "00000-0", table("pairs", content, round), {})
    return [tmp_path / "one", tmp_path / "two"]


def trained_on(monkeypatch) -> list[list[list[int]]]:
    """The token ids of every training that follows, sorted."""
    found = []

    class Watched(sft_room.ShuffledSequences):
        def __init__(self, sequences, *words, **options) -> None:
            found.append(sorted(sequence.ids.tolist() for sequence in sequences))
            super().__init__(sequences, *words, **options)

    monkeypatch.setattr(sft_room, "ShuffledSequences", Watched)
    return found


def test_raft_takes_the_best_over_all_stores_of_its_round_alone(run, tmp_path, capsys, monkeypatch):
    """Samples of one query in two stores are one best of 4; another query with the same number is another one."""
    first = row(1, 0.0, 1.0)
    better = row(1, 3.0, 2.0, sample=1, y_ids=[25, 26])
    other = row(2, 5.0, 4.0, query_id="q1")
    found = trained_on(monkeypatch)
    run("raft", data=two_stores(tmp_path, [first], [better, other], round=1))
    assert found == [sorted([[*better["x_ids"], 25, 26], [*other["x_ids"], *other["y_ids"]]])]
    assert "raft: 2 responses, each the best of 2 or 4" in capsys.readouterr().err


def test_references_of_two_stores_with_the_same_ids_are_both_kept(run, policy, tmp_path, monkeypatch):
    one, two = row(1, 0.0, 1.0), row(2, 0.0, 1.0, query_id="q1")
    found = trained_on(monkeypatch)
    run("sft", data=two_stores(tmp_path, [one, one | {"sample": 1}], [two]), round=0)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    assert found == [
        sorted([*r["x_ids"], *tokenizer(r["reference"]).input_ids, tokenizer.eos_token_id] for r in (one, two))
    ]


def test_a_reference_ends_as_its_round_was_asked(tmp_path):
    tokenizer = tiny.tiny_tokenizer(chat=tiny.TURNS, special=("<|turn|>", "<|over|>"))
    ends = {0: ("plain", tiny.EOS), 1: ("chat", "<|over|>")}
    for round, (asked, _) in ends.items():
        rows = table("pairs", [row(round, 0.0, 1.0)], round)
        Store(tmp_path).commit("pairs", round, f"{round:05d}-0", rows, {"prompts": asked})
    found = baselines.with_reference_ids(freeze([tmp_path], 1, None), tokenizer).sort("round")
    assert [tokenizer.decode(ids[-1]) for ids in found["ids"]] == [end for _, end in ends.values()]


@pytest.mark.parametrize("method", ["context-distillation", "raft", "dpo", "ple"])
def test_tokens_sampled_are_those_of_all_rows_also_of_those_left_out(run, policy, pairs, tmp_path, method):
    """max_length 5 leaves out every pair with a response of more than 2 ids."""
    if method == "ple":
        output = tmp_path / "out"
        training.train(Train(model=str(policy), data=[pairs], round=1, output=output, tau0=0.2, max_length=5))
    else:
        output = run(method, max_length=5)
    arms = ("y_prompt_ids",) if method == "context-distillation" else ("y_ids", "y_prompt_ids")
    new, reused = (sum(len(r[arm]) for r in ROUNDS[t] for arm in arms) for t in (1, 0))
    cost = record(output)["cost"]
    assert (cost["tokens_sampled"], cost["tokens_reused"]) == (new, 0 if method == "raft" else reused)
    assert cost["tokens_trained"] < new + reused


def test_texts_are_not_read_where_ids_are_enough(run, monkeypatch):
    read, found = Store.read, set()

    def watched(self, shard, columns=None):
        found.update(columns or ["all"])
        return read(self, shard, columns)

    monkeypatch.setattr(Store, "read", watched)
    for method in ("sft", "context-distillation", "raft", "dpo"):
        run(method, method)
    assert not {"x", "y", "y_prompt", "all"} & found
    assert {"x_ids", "y_ids", "reference"} <= found


def test_a_store_without_references_is_refused(run, tmp_path):
    Store(tmp_path / "bare").commit("pairs", 0, "00000-0", table("pairs", [{}]), {})
    with pytest.raises(UsageError, match="queries came without references"):
        run("sft", data=[tmp_path / "bare"], round=0)


def test_killed_and_resumed_is_the_same_to_the_bit(run, monkeypatch):
    options = {"batch_size": 1, "epochs": 2, "checkpoint_every": 1}
    whole = run("raft", "whole", **options)
    original, calls = SftObjective.__call__, iter(range(100))
    with monkeypatch.context() as patch:

        def stop(self, model, batch, step):
            if next(calls) == 2:
                raise KeyboardInterrupt
            return original(self, model, batch, step)

        patch.setattr(SftObjective, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            run("raft", "resumed", **options)
    resumed = run("raft", "resumed", **options)
    for name, expected in load_file(whole / "adapter_model.safetensors").items():
        assert torch.equal(load_file(resumed / "adapter_model.safetensors")[name], expected)
    assert record(resumed)["cost"]["tokens_trained"] == record(whole)["cost"]["tokens_trained"]


# --- DPO -----------------------------------------------------------------------------------------------------------


def dpo_pairs() -> list[tuple[list[int], list[int], list[int]]]:
    """(x, chosen, rejected) by hand: the tie of round 0 is not among them."""
    found = []
    for r in (r for rows in ROUNDS for r in rows if r["s"] != r["s_prompt"]):
        better, worse = ("y_prompt_ids", "y_ids") if r["s_prompt"] > r["s"] else ("y_ids", "y_prompt_ids")
        found.append((r["x_ids"], r[better], r[worse]))
    return found


def test_dpo_raises_the_margin_of_the_chosen_over_the_rejected(run, plain, policy, capsys):
    output = run("dpo", epochs=8, batch_size=5)
    streams = capsys.readouterr()
    assert "dpo: 5 pairs; 1 left out, their rewards are equal" in streams.err
    assert streams.out == ""
    metrics = pl.read_parquet(output / "metrics.parquet")
    assert metrics["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["rewards_margins"][-1] > 0.1
    cost = record(output)["cost"]
    assert cost["tokens_trained"] == 8 * sum(len(c) + len(r) for _, c, r in dpo_pairs())
    assert record(output)["settings"]["trl"] == importlib.metadata.version("trl")

    from peft import PeftModel

    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy).double(), output).eval()
    assert list(tuned.peft_config) == ["default"]
    for x, chosen, rejected in dpo_pairs():
        gain = sum(logps(tuned, x, chosen)) - sum(logps(plain, x, chosen))
        loss = sum(logps(tuned, x, rejected)) - sum(logps(plain, x, rejected))
        assert gain > loss


def test_dpo_measures_against_the_start_policy_when_it_goes_on_from_an_adapter(run, adapter, plain, policy):
    """The loss of the first step, by hand: - mean log sigmoid(beta * (log-ratio of chosen - log-ratio of rejected))."""
    from peft import PeftModel

    output = run("dpo", adapter=str(adapter), batch_size=100, beta=0.3)
    begun = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy), adapter).double().eval()
    losses = []
    for x, chosen, rejected in dpo_pairs():
        ratios = [sum(logps(begun, x, y)) - sum(logps(plain, x, y)) for y in (chosen, rejected)]
        losses.append(math.log1p(math.exp(-0.3 * (ratios[0] - ratios[1]))))
    assert first_loss(output) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_dpo_does_not_need_a_pad_token_with_a_row_in_the_embedding(run, monkeypatch):
    load = Session.load_tokenizer

    def widened(session, **how):
        tokenizer = load(session, **how)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        return tokenizer

    plain = run("dpo", "plain", batch_size=5)
    monkeypatch.setattr(Session, "load_tokenizer", widened)
    other = run("dpo", "other", batch_size=5)
    for name, expected in load_file(plain / "adapter_model.safetensors").items():
        torch.testing.assert_close(load_file(other / "adapter_model.safetensors")[name], expected, rtol=0, atol=1e-5)


def test_dpo_in_micro_batches_learns_the_same(run):
    once, often = run("dpo", "once", batch_size=5), run("dpo", "often", batch_size=5, microbatch_tokens=8)
    for name, expected in load_file(once / "adapter_model.safetensors").items():
        torch.testing.assert_close(load_file(often / "adapter_model.safetensors")[name], expected, rtol=0, atol=1e-5)


def test_a_killed_dpo_starts_over_and_ends_the_same(run, monkeypatch):
    whole = run("dpo", "whole", batch_size=2)
    with monkeypatch.context() as patch:

        def stop(progress: Progress, count: int, detail: str = "") -> None:
            raise KeyboardInterrupt

        patch.setattr(Progress, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            run("dpo", "killed", batch_size=2)
    assert not (whole.parent / "killed" / "ple.json").exists()
    killed = run("dpo", "killed", batch_size=2)
    for name, expected in load_file(whole / "adapter_model.safetensors").items():
        assert torch.equal(load_file(killed / "adapter_model.safetensors")[name], expected)


def test_dpo_in_bf16_compares_in_float32(run):
    """Before the first step both log-ratios are 0, so the loss is log 2; in bfloat16 it would be 0.6914."""
    assert first_loss(run("dpo", precision="bf16", batch_size=5)) == pytest.approx(math.log(2), abs=1e-5)


def test_a_seed_beyond_what_numpy_takes_trains_by_trl_too(run):
    output = run("dpo", seed=2**32, batch_size=5)
    assert record(output)["settings"]["seed"] == 2**32


@pytest.fixture
def installed_trl(monkeypatch):
    """installed_trl("1.16.0"): the version that this environment is taken to have; None for none."""
    version = importlib.metadata.version

    def installed(found: str | None) -> None:
        def of(name: str) -> str:
            if name == "trl" and found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found if name == "trl" and found else version(name)

        monkeypatch.setattr(importlib.metadata, "version", of)

    return installed


@pytest.mark.parametrize(
    ("method", "installed", "message"),
    [
        ("dpo", None, "`ple baseline dpo` runs in trl, which is not installed: pip install 'ple-align[trl]'"),
        ("dpo", "1.17.0", "runs in TRL 1.12 to 1.16, but trl 1.17.0 is installed: pip install 'ple-align[trl]'"),
        ("dpo", "0.29.0", "runs in TRL 1.12 to 1.16, but trl 0.29.0 is installed"),
        ("ppo", None, "`ple baseline ppo` runs in trl, which is not installed: pip install 'ple-align[ppo]'"),
        ("ppo", "1.16.0", "runs in TRL 1.12, but trl 1.16.0 is installed: pip install 'ple-align[ppo]'"),
    ],
)
def test_a_baseline_in_trl_says_which_one_it_needs(installed_trl, method, installed, message):
    installed_trl(installed)
    with pytest.raises(UsageError, match=re.escape(message)):
        require_trl(method)


def test_the_extras_bring_the_versions_that_are_tested():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (oldest, newest), (ppo, _) = VERSIONS["dpo"], VERSIONS["ppo"]
    assert extras["trl"] == [f"trl>={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"]
    assert extras["ppo"] == [f"trl=={ppo[0]}.{ppo[1]}.0"]


def test_a_result_of_another_trl_is_still_the_result(run, installed_trl, capsys):
    """A finished output names the TRL that made it, and stays; what was killed starts over with the one there is."""
    output = run("dpo", batch_size=5)
    made = record(output) | {"settings": record(output)["settings"] | {"trl": "1.13.0"}}
    (output / "ple.json").write_text(json.dumps(made))
    run("dpo", batch_size=5)
    assert "is complete already" in capsys.readouterr().err
    assert record(output)["settings"]["trl"] == "1.13.0"
    run("dpo", batch_size=5, resume=False)
    assert record(output)["settings"]["trl"] == importlib.metadata.version("trl")


def test_all_ties_and_foreign_ids_are_refused(run, tmp_path):
    tie = {"s": 1.0, "s_prompt": 1.0}
    Store(tmp_path / "ties").commit("pairs", 0, "00000-0", table("pairs", [tie]), {})
    with pytest.raises(UsageError, match="all 1 pairs of --data have equal rewards"):
        run("dpo", data=[tmp_path / "ties"], round=0)
    Store(tmp_path / "foreign").commit("pairs", 0, "00000-0", table("pairs", [{"y_ids": [9999], "s": 9.0}]), {})
    for method in ("dpo", "raft"):
        with pytest.raises(UsageError, match="made with another tokenizer"):
            run(method, f"foreign-{method}", data=[tmp_path / "foreign"], round=0)


# --- ablations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("without", ["rank", "wsft"])
def test_ablations_train_with_the_oracles_coefficients(policy, pairs, tmp_path, without):
    stream = PairStream(
        freeze([pairs], 1, None),
        Train(model="m", data=[pairs], round=1, output="none", without=without, tau0=0.2, batch_size=9),
        SimpleNamespace(vocabulary=384, positions=None),
    )
    ((sequences, count),) = stream.batches(0, 0)
    found = {(s.tag.arm, *s.ids.tolist()): (s.tag.set, s.tag.coefficient) for s in sequences}
    expected = {}
    for r in (r for rows in ROUNDS for r in rows):
        of = oracle.row(r["s"], r["s_prompt"], len(r["y_ids"]), len(r["y_prompt_ids"]), 0.2 * 0.9, without=without)
        for arm, coefficient in (("y", of.c), ("y_prompt", of.c_prompt)):
            if coefficient != 0:
                expected[arm, *r["x_ids"], *r[f"{arm}_ids"]] = (of.set, pytest.approx(coefficient, rel=1e-6))
    assert count == 6
    assert found == expected
    training.train(
        Train(
            model=str(policy), data=[pairs], round=1, output=tmp_path / "out", without=without, tau0=0.2, batch_size=9
        )
    )
    assert record(tmp_path / "out")["settings"]["without"] == without
    tokens = sum(s.response for s in sequences)
    assert record(tmp_path / "out")["cost"]["tokens_trained"] == tokens


# --- the command line and the recipe -------------------------------------------------------------------------------


def values(**baseline) -> dict:
    return {
        **{"model": "m", "queries": "q", "principles": "none", "reward_model": "r", "run_dir": "run", "rounds": 2},
        "baseline": baseline,
    }


def test_a_recipe_with_a_baseline_trains_by_it():
    recipe = parse_recipe(values(method="dpo", beta=0.05), "test")
    stages = rounds.plan(recipe)
    assert [stage.name for stage in stages] == ["gen", "score", "baseline"] * 2
    words = list(stages[5].command[1:])
    assert words[:2] == ["baseline", "dpo"]
    assert words[2:4] == ["--beta", "0.05"]
    assert words[words.index("--adapter") + 1] == "run/policy/round=000"
    assert words[words.index("--output") + 1] == "run/policy/round=001"
    assert "--tau0" not in words
    cli.baseline.commands["dpo"].make_context("dpo", words[2:])  # every option is known
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json"))), "again") == recipe


def test_a_baseline_is_started_by_its_launcher():
    stage = rounds.plan(parse_recipe(values(method="raft", launch="torchrun --nproc-per-node 2"), "test"))[2]
    program, *words = stage.launch
    assert (Path(program).name, words) == ("torchrun", ["--nproc-per-node", "2"])
    assert stage.shell_line.startswith(f"{program} --nproc-per-node 2 {stage.command[0]} baseline raft ")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "raft", "beta": 0.5}, "beta is no option of raft"),
        ({"method": "dpo", "full": True}, "full is no option of dpo"),
        ({"method": "ppo"}, "baseline.method: Input should be 'sft', 'context-distillation', 'raft' or 'dpo'"),
        ({}, "baseline.method: missing"),
    ],
)
def test_wrong_baselines_in_a_recipe_are_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        parse_recipe(values(**wrong), "test")


def test_a_recipe_can_leave_out_a_term():
    recipe = parse_recipe({**values(), "baseline": None, "train": {"without": "rank"}}, "test")
    words = rounds.plan(recipe)[2].command
    assert words[words.index("--without") + 1] == "rank"


# --- PPO -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def queries(tmp_path) -> Path:
    path = tmp_path / "queries.jsonl"
    path.write_text("\n".join(json.dumps({"x": text}) for text in tiny.corpus()[:12]))
    return path


@pytest.fixture
def trl_with_ppo() -> None:
    found = importlib.metadata.version("trl")
    if tuple(map(int, found.split(".")[:2])) > VERSIONS["ppo"][1]:
        pytest.skip(f"TRL {found} has no PPO: pip install -e '.[ppo]'")


@pytest.fixture
def letters(tmp_path) -> str:
    """A reward model: how often the letter e stands in y."""
    path = tmp_path / "letters.py"
    path.write_text("def score(xs, ys):\n    print('scored')\n    return [float(y.count('e')) for y in ys]\n")
    return f"{path}:score"


def test_ppo_samples_to_its_budget_and_writes_an_adapter(policy, queries, letters, tmp_path, capsys, trl_with_ppo):
    from ple_train.measure.sample import sample_responses

    output = tmp_path / "ppo"
    options = {"model": str(policy), "queries": str(queries), "reward_model": letters, "sampled_tokens": 40}
    ppo_room.ppo(
        Ppo(output=output, **options, max_new_tokens=6, batch_size=6, microbatch_tokens=64, learning_rate=1e-3)
    )
    assert capsys.readouterr().out == ""
    metrics = pl.read_parquet(output / "metrics.parquet")
    cost = record(output)["cost"]
    assert 40 <= cost["tokens_sampled"] < 40 + 6 * 6
    assert cost["tokens_trained"] == 4 * cost["tokens_sampled"]
    assert metrics.height == record(output)["steps"] >= 2
    assert metrics["objective_kl"][0] == pytest.approx(0, abs=1e-4)
    tensors = load_file(output / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in tensors.items() if "lora_B" in name)
    assert len(sample_responses(str(policy), ["The film"], adapter=str(output), engine="hf", max_new_tokens=4)) == 1

    ppo_room.ppo(
        Ppo(output=output, **options, max_new_tokens=6, batch_size=6, microbatch_tokens=64, learning_rate=1e-3)
    )
    assert "is complete already" in capsys.readouterr().err


@pytest.fixture
def run_ppo(policy, queries, letters, tmp_path, trl_with_ppo):
    """Train by PPO into tmp_path/NAME, in micro-batches of 3 of 6 responses → the directory."""

    def run(name: str, **more) -> Path:
        options = {"sampled_tokens": 40, "max_new_tokens": 6, "batch_size": 6, "microbatch_tokens": 64}
        options |= {"reward_model": letters, **more}
        ppo_room.ppo(
            Ppo(
                model=str(policy),
                queries=str(queries),
                output=tmp_path / name,
                learning_rate=1e-3,
                **options,
            )
        )
        return tmp_path / name

    return run


def lora_weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def test_equal_seeds_give_equal_adapters_in_one_step_a_pass_over_the_batch(run_ppo):
    """Also in the last batch of a pass over the queries, after which accelerate would step with every micro-batch."""
    steps = []
    hook = register_optimizer_step_pre_hook(lambda *_: steps.append(1) and None)
    try:
        first = run_ppo("first")
    finally:
        hook.remove()
    updates = record(first)["steps"]
    assert updates >= 2
    assert len(steps) == Ppo.__dataclass_fields__["ppo_epochs"].default * updates
    second = lora_weights(run_ppo("second"))
    for name, weight in lora_weights(first).items():
        assert torch.equal(second[name], weight), name


@pytest.mark.parametrize(("norm", "moves"), [(1e-12, False), (1.0, True)])
def test_ppo_clips_gradients(run_ppo, norm, moves):
    """AdamW adds 1e-8 to the root of the second moment: gradients of a norm of 1e-12 move a weight by 1e-4 of the
    learning rate at most, other gradients by about the learning rate.
    """
    weights = lora_weights(run_ppo("out", max_grad_norm=norm, sampled_tokens=1))
    moved = max(weight.abs().max().item() for name, weight in weights.items() if "lora_B" in name)
    assert (moved > 1e-4) == moves
    assert moves or moved < 1e-6


def test_ppo_measures_against_the_start_policy_when_it_goes_on_from_an_adapter(
    run_ppo, adapter, plain, policy, monkeypatch
):
    """The first step's KL by hand: the mean over responses of log pi_adapter(y|x) - log pi_0(y|x)."""
    from peft import PeftModel

    seen, backbone = [], ppo_room.RewardScorer.backbone

    def watched(self, input_ids, attention_mask, **more):
        rows = [(ids.tolist(), mask.tolist()) for ids, mask in zip(input_ids, attention_mask.bool(), strict=True)]
        starts = [mask.index(True) for _, mask in rows]
        width = self._query_width([ids for ids, _ in rows], starts)
        for (ids, mask), start in zip(rows, starts, strict=True):
            seen.append((ids[start:width], [i for i, kept in zip(ids[width:], mask[width:], strict=True) if kept]))
        return backbone(self, input_ids, attention_mask, **more)

    monkeypatch.setattr(ppo_room.RewardScorer, "backbone", watched)
    output = run_ppo("out", adapter=str(adapter), sampled_tokens=1)
    begun = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy), adapter).double().eval()
    assert len(seen) == 6
    kl = sum(sum(logps(begun, x, y)) - sum(logps(plain, x, y)) for x, y in seen) / len(seen)
    assert abs(kl) > 0.1
    assert pl.read_parquet(output / "metrics.parquet")["objective_kl"][0] == pytest.approx(kl, rel=1e-4)


def test_ppo_keeps_no_secret_of_an_address(run_ppo, monkeypatch):
    monkeypatch.setattr(HttpReward, "score", lambda self, rows: [float(len(y)) for _, y in rows])
    output = run_ppo("out", reward_model="https://h/r?token=sesame", sampled_tokens=1)
    kept = f"https://h/r?{text_digest('token=sesame')}"
    assert [record(output)["settings"][name] for name in ("reward_model", "reward")] == [kept, kept]
    assert f"| reward_model | `{kept}` |" in (output / "README.md").read_text()
    assert not [path for path in output.rglob("*") if path.is_file() and b"sesame" in path.read_bytes()]


def test_ppo_refuses_what_cannot_work(policy, queries, letters, tmp_path, trl_with_ppo):
    options = {"model": str(policy), "queries": str(queries), "output": tmp_path / "ppo", "sampled_tokens": 40}
    with pytest.raises(UsageError, match="12 different queries of at most 256 tokens, fewer than one batch"):
        ppo_room.ppo(Ppo(**options, reward_model=letters))
    with pytest.raises(UsageError, match="over the 2048 positions"):
        ppo_room.ppo(Ppo(**options, reward_model=letters, batch_size=4, max_new_tokens=4000))
    (tmp_path / "nan.py").write_text("def score(xs, ys):\n    return [float('nan')] * len(xs)\n")
    with pytest.raises(PleError, match="gave nan to a response to the query"):
        ppo_room.ppo(Ppo(**options, reward_model=f"{tmp_path}/nan.py:score", batch_size=4, max_new_tokens=4))


class Recorder:
    """A reward model that remembers what it was asked."""

    name, truncated = "recorder", 0

    def score(self, rows):
        self.rows = list(rows)
        return [float(len(y)) for _, y in rows]


def test_the_scorer_reads_query_and_response_out_of_padded_ids(policy, trl_with_ppo):
    """The first query is the beginning of the second one: only together do the rows say where responses begin."""
    from trl.experimental.utils import get_reward

    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.add_tokens("<|over|>")  # a mark that ends turns, and no special token
    pad, end = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<|over|>")
    short, long = (tuple(tokenizer(text).input_ids) for text in ("the film", "the film was great"))
    good, bad = (tokenizer(text).input_ids for text in (" great.", " very bad."))
    rows = [[pad] * (len(long) - len(short)) + [*short, *long[len(short) :], *good, end], [*long, *bad]]
    width = max(map(len, rows))
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids in rows])
    rewards = Recorder()
    scorer = ppo_room.RewardScorer(rewards, tokenizer, end, {short: "X short", long: "X long"})
    _, scores, _ = get_reward(scorer, ids, pad, len(long))
    tail = tokenizer.decode(long[len(short) :])
    assert rewards.rows == [("X short", f"{tail} great."), ("X long", " very bad.")]
    assert scores.tolist() == [len(y) for _, y in rewards.rows]
    assert scorer.tokens == len(long) - len(short) + len(good) + 1 + len(bad)


def test_the_scorer_reads_the_answer_behind_a_thought(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    x = tuple(tokenizer("the film<think>").input_ids)
    rewards = Recorder()
    thoughts = Thoughts(tokenizer, "think")
    scorer = ppo_room.RewardScorer(rewards, tokenizer, tokenizer.eos_token_id, {x: "X"}, thoughts)
    for said, answer in (("so so</think> great.", "great."), ("so so", "")):
        ids = torch.tensor([[*x, *tokenizer(said).input_ids, tokenizer.eos_token_id]])
        scorer.backbone(ids, torch.ones_like(ids))
        assert rewards.rows == [("X", answer)]
    assert scorer.tokens == len(tokenizer("so so</think> great.").input_ids) + len(tokenizer("so so").input_ids) + 2


def test_a_row_alone_is_read_as_the_longest_query_that_it_begins_with(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    short, long = (tuple(tokenizer(text).input_ids) for text in ("the film", "the film was great"))
    row = torch.tensor([[*long, *tokenizer(" and funny.").input_ids]])
    rewards = Recorder()
    scorer = ppo_room.RewardScorer(rewards, tokenizer, tokenizer.eos_token_id, {short: "X short", long: "X long"})
    scorer.backbone(row, torch.ones_like(row))
    assert rewards.rows == [("X long", " and funny.")]


def test_a_tokenizer_that_pads_with_its_end_gets_another_pad(tmp_path):
    from ple_data.common.models import load_tokenizer
    from ple_train.model.policy import load_trainable

    model = str(tiny.tiny_policy(tmp_path / "no-pad", pad=False))
    tokenizer = load_tokenizer(model, note=lambda _: None)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    queries = [tuple(tokenizer(text).input_ids) for text in tiny.corpus()[:4]]
    own = ppo_room.with_own_pad(tokenizer, load_trainable(model, Trainable()), queries)
    assert own.pad_token_id not in {
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        *(i for ids in queries for i in ids),
    }
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_pad_token_without_a_row_in_the_embedding_is_replaced_for_ppo(policy):
    from ple_data.common.models import load_tokenizer
    from ple_train.model.policy import load_trainable

    tokenizer = load_tokenizer(policy)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = load_trainable(str(policy), Trainable())
    rows = model.get_input_embeddings().weight.shape[0]
    assert tokenizer.pad_token_id >= rows
    assert ppo_room.with_own_pad(tokenizer, model, [(5, 6)]).pad_token_id < rows


def test_an_output_of_another_baseline_was_not_made_by_trl(run):
    """Neither a finished one nor one that was begun."""
    output = run("raft", batch_size=5)
    assert not dpo_room.made_by_trl(output)
    with pytest.raises(UsageError, match=r"the result of another command \(baseline\)"):
        run("dpo", via=None)
    (output / "ple.json").unlink()
    assert not dpo_room.made_by_trl(output)


def test_dpo_is_our_own_loop_but_where_an_output_was_made_by_trl(run, pairs, policy, tmp_path, monkeypatch):
    ours = run("dpo", "ours", via=None, batch_size=5)
    assert record(ours)["kind"] == "ple"
    assert record(ours)["settings"]["objective"] == "dpo"
    same = {"model": str(policy), "data": [pairs], "round": 1, "learning_rate": 1e-3, "batch_size": 5, "beta": 0.1}
    training.train(Train(output=tmp_path / "same", objective="dpo", **same))
    found, expected = (load_file(path / "adapter_model.safetensors") for path in (ours, tmp_path / "same"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    by_trl = run("dpo", "by trl", batch_size=5)
    assert record(by_trl)["kind"] == "baseline"
    monkeypatch.setattr(dpo_room, "train", None)
    run("dpo", "by trl", via=None, batch_size=5)  # finished: there is nothing to do
    (by_trl / "ple.json").unlink()
    run("dpo", "by trl", via=None, batch_size=5)  # begun: TRL starts over
    assert record(by_trl)["kind"] == "baseline"
