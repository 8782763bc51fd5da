"""Demanding models and adapters in whole commands: right numbers, or one sentence before the first step."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ple_data.rewards import load_reward_model
from ple_data.storage.store import Store
from ple_train.reward import train_reward
from ple_train.sft import sft
from schemas.options import Reward, Rewards, Sft
from tests import tiny
from tests.test_bad_input import gen_words, ple, refused, train_words

LONG = " ".join(tiny.corpus()[:40])


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    path = tmp_path / "queries.jsonl"
    path.write_text("".join(json.dumps({"x": text}) + "\n" for text in ("the film", "my friend needs the answer")))
    return path


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    rows = [{"prompt": f"the film {n}", "chosen": f" was great {n} {LONG}", "rejected": " was bad"} for n in range(4)]
    path = tmp_path / "preferences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def without_a_weight(model: Path, directory: Path) -> Path:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(model, directory))
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def words_of(command: str, model: Path, given: Path | None, place: Path) -> list:
    """The command line that loads `model`; score takes the rows that lie in `place` already."""
    if command == "gen":
        return gen_words(model, given, place / "data")
    if command == "score":
        return ["score", "--reward-model", model, "--data", place / "data"]
    return [command, "--model", model, "--data", given, "--output", place / "out"]


@pytest.mark.parametrize("command", ["gen", "sft", "reward", "score"])
def test_every_command_names_a_weight_that_is_missing(policy, reward, queries, preferences, tmp_path, command):
    model = without_a_weight(reward if command == "score" else policy, tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"x": "the film", "y": " was great"}\n')
    if command == "score":
        assert ple(*gen_words(policy, queries, tmp_path / "data")).exit_code == 0
    inputs = {"gen": queries, "sft": rows, "reward": preferences, "score": None}
    refused(
        ple(*words_of(command, model, inputs[command], tmp_path)),
        2,
        model,
        "model.layers.1.mlp.up_proj.weight",
        "random numbers",
    )


def test_capped_attention_samples_scores_and_trains_with_its_cap(queries, tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2ForSequenceClassification

    tokenizer = tiny.tiny_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 16, "sliding_window": 64}
    ends = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2, "vocab_size": len(tokenizer)}
    for name, kind in (("policy", Gemma2ForCausalLM), ("reward", Gemma2ForSequenceClassification)):
        torch.manual_seed(0)
        model = kind(Gemma2Config(**sizes, **heads, **ends, num_labels=1))
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(40.0 if weight.dim() > 1 else 1.0)  # attention's logits reach the cap
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    words = gen_words(tmp_path / "policy", queries, tmp_path / "data", "--reward-model", tmp_path / "reward")
    assert ple(*words).exit_code == 0
    load = {"attn_implementation": "eager"}
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", **load)
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", **load)
    for row in Store(tmp_path / "data").scan("pairs").collect().iter_rows(named=True):
        ids = torch.tensor([row["x_ids"] + row["y_ids"]])
        logps = policy(ids).logits[0, len(row["x_ids"]) - 1 : -1].log_softmax(-1)
        assert row["y_logps"] == pytest.approx(
            logps.gather(1, ids[0, len(row["x_ids"]) :, None])[:, 0].tolist(), abs=1e-3
        )
        own = reward(**tokenizer(row["x"] + row["y"], return_tensors="pt")).logits.item()
        assert row["s"] == pytest.approx(own, abs=1e-3)
    refused(
        ple(*gen_words(tmp_path / "policy", queries, tmp_path / "new"), "--engine-arg", "attn_implementation=sdpa"),
        2,
        "sdpa",
    )


def test_a_pad_token_without_a_row_in_the_embedding_does_no_harm(reward, queries, preferences, tmp_path):
    def widened(model: Path, name: str) -> Path:
        copy = Path(shutil.copytree(model, tmp_path / name))
        tokenizer = AutoTokenizer.from_pretrained(copy)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer.save_pretrained(copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
        return copy

    base = tiny.tiny_policy(tmp_path / "base")
    policy, scorer = widened(base, "policy"), widened(reward, "scorer")
    words = gen_words(policy, queries, tmp_path / "data", "--engine-arg", "batch_size=8", "--reward-model", scorer)
    assert ple(*words).exit_code == 0
    assert ple(*gen_words(base, queries, tmp_path / "other", "--reward-model", reward)).exit_code == 0
    found, expected = (Store(tmp_path / name).scan("pairs").sort("query_id").collect() for name in ("data", "other"))
    assert found["y_ids"].to_list() == expected["y_ids"].to_list()
    assert found["s"].to_list() == pytest.approx(expected["s"].to_list(), abs=1e-5)
    train_reward(Reward(model=str(policy), data=preferences, output=tmp_path / "trained"))
    adapter = tiny.tiny_adapter(policy, tmp_path / "adapter")
    words = gen_words(policy, queries, tmp_path / "tuned", "--engine-arg", "batch_size=8", "--adapter", adapter)
    assert ple(*words).exit_code == 0


@pytest.mark.parametrize("command", ["gen", "sft", "reward", "score"])
def test_a_text_with_a_token_that_the_model_has_no_row_for_is_refused(policy, reward, queries, tmp_path, command):
    source = reward if command == "score" else policy
    model = Path(shutil.copytree(source, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(model)
    odd = tmp_path / "odd.jsonl"
    row = {"x": "the film of a zebra", "y": " was great", "prompt": "a", "chosen": " zebra", "rejected": " b"}
    odd.write_text(json.dumps({name: row[name] for name in row if (name in "xy") != (command == "reward")}) + "\n")
    if command == "score":
        assert ple(*gen_words(policy, odd, tmp_path / "data")).exit_code == 0
    refused(ple(*words_of(command, model, odd, tmp_path)), 2, "token", "embedding of", "resize_token_embeddings")


def test_a_long_text_is_cut_to_the_positions_of_a_roberta(tmp_path):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    tokenizer = tiny.tiny_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=66, pad_token_id=1, num_labels=1)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    rewards = load_reward_model(str(tmp_path / "reward"), Rewards())
    long, cut = rewards.score([("", LONG), ("", tokenizer.decode(tokenizer(LONG).input_ids[-64:]))])
    assert rewards.truncated == 1
    assert long == pytest.approx(cut, abs=1e-5)


def test_reward_training_keeps_to_the_positions_and_needs_no_eos(preferences, tmp_path, capsys):
    model = tiny.tiny_policy(tmp_path / "model", eos=False, pad=False, max_position_embeddings=32)
    train_reward(Reward(model=str(model), data=preferences, output=tmp_path / "out"))
    assert "texts are kept to their last 32 ids" in capsys.readouterr().err
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 32
    [value] = load_reward_model(str(tmp_path / "out"), Rewards()).score([("the film", LONG)])
    assert math.isfinite(value)


def test_a_generation_configuration_that_transformers_will_not_save_is_kept(policy, tmp_path):
    model = Path(shutil.copytree(policy, tmp_path / "model"))
    came = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 1, "pad_token_id": 0}  # and no do_sample
    (model / "generation_config.json").write_text(json.dumps(came))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"x": "the film", "y": " was great"}\n')
    sft(Sft(model=str(model), data=rows, output=tmp_path / "out"))
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert came.items() <= saved.items()


def test_training_does_not_go_on_where_off_is_not_the_start_policy(policy, reward, queries, tmp_path):
    assert ple(*gen_words(policy, queries, tmp_path / "data", "--reward-model", reward)).exit_code == 0
    pissa = tiny.tiny_adapter(policy, tmp_path / "pissa", init_lora_weights="pissa")
    words = train_words(policy, tmp_path / "data", tmp_path / "out", "--adapter", pissa)
    refused(ple(*words), 2, pissa, "init_lora_weights pissa", "not its start policy", "--full")
    assert ple(*words, "--full").exit_code == 0
    assert ple(*gen_words(policy, queries, tmp_path / "more", "--adapter", pissa)).exit_code == 0
