"""The recipes of the paper: they parse, say what the paper says, and run whole on small models of the same kinds."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
import transformers
from click.testing import CliRunner

import cli
from ple_train.run import rounds
from ple_train.run.child import Ended
from schemas.recipe import Recipe, load_recipe, parse_recipe
from tests import tiny
from tests.conftest import ROOT

PAPER = ROOT / "recipes" / "paper"
NAMES = ["hh-llama3", "hh-qwen", "imdb-gpt2", "tldr-gpt2"]
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2.5's, less its tools."""
ALTERNATES = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
"""How Gemma's and Mistral's begin."""
GEMMA = ALTERNATES + (
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}"
)
MISTRAL = ALTERNATES + (
    "{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else m['content'] + eos_token }}{% endfor %}"
)
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
SIZES |= {"max_position_embeddings": 8192, "initializer_range": 0.1}
GROUPED = SIZES | {"num_key_value_heads": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By hub id, the directory of a small random model of its kind, with what is odd about its tokenizer."""
    root = tmp_path_factory.mktemp("models")
    base = tiny.tiny_tokenizer(add_bos=True, pad=False)
    qwen = tiny.tiny_tokenizer(chat=CHATML, special=("<|im_start|>", "<|im_end|>"))
    qwen.bos_token = None
    gpt2 = tiny.tiny_tokenizer(pad=False)
    gpt2.bos_token = tiny.EOS
    gpt2.model_max_length = 1024
    gemma = tiny.tiny_tokenizer(vocab=320, chat=GEMMA, add_bos=True)
    gemma.padding_side = "left"
    mistral = tiny.tiny_tokenizer(vocab=320, chat=MISTRAL, add_bos=True, pad=False)
    gpt2_sizes = {"n_positions": 1024, "n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.1}
    one = {"num_labels": 1}
    kinds = {
        "meta-llama/Meta-Llama-3-8B": ("Llama", "CausalLM", base, GROUPED),
        "Qwen/Qwen2.5-7B": ("Qwen2", "CausalLM", qwen, GROUPED),
        "openai-community/gpt2": ("GPT2", "LMHead", gpt2, gpt2_sizes),
        "weqweasdas/RM-Gemma-2B": (
            "Gemma",
            "ForSequenceClassification",
            gemma,
            SIZES | one | {"num_key_value_heads": 1},
        ),
        "weqweasdas/RM-Mistral-7B": ("Mistral", "ForSequenceClassification", mistral, GROUPED | one),
    }
    found = {}
    for hub_id, (kind, head, tokenizer, sizes) in kinds.items():
        torch.manual_seed(0)
        names = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **names, **sizes)
        head = {"CausalLM": "ForCausalLM", "LMHead": "LMHeadModel"}.get(head, head)
        directory = root / hub_id.replace("/", "-")
        getattr(transformers, kind + head)(config).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        found[hub_id] = str(directory)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/paper-data as prepare.py makes it of small files in the form of the public datasets."""
    root = tmp_path_factory.mktemp("data")
    texts = tiny.corpus()[::4]
    dialogues = [
        *(f"\n\nHuman: {a}\n\nAssistant: {b}" for a, b in zip(texts[:16], texts[16:], strict=False)),
        f"\n\nHuman: {texts[0]}\n\nAssistant: {texts[1]}\n\nHuman: {texts[2]}\n\nAssistant: {texts[3]}",
        *(f"\n\nHuman: {text}\n\nHuman: {texts[1]}\n\nAssistant: {texts[2]}" for text in texts[3:10]),
        "\n\nHuman: \n\nAssistant: What?",
    ]
    reviews = [{"text": f"{a} {b}<br /><br />{a}", "label": n % 2} for n, (a, b) in enumerate(zip(texts, texts[9:]))]
    posts = [f"SUBREDDIT: r/a\n\nTITLE: {text}\n\nPOST: {text}\n\nTL;DR:" for text in texts]
    summaries = [{"prompt": post, "completion": f" {text}"} for post, text in zip(posts, texts[3:])]
    said = [
        [{"role": "user", "content": post}, {"role": "assistant", "content": text}] for post, text in zip(posts, texts)
    ]
    pairs = [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in zip(posts, said, said[5:])]
    files = {
        "hh": {name: [{"chosen": text, "rejected": ""} for text in dialogues] for name in ("train", "test")},
        "imdb": {"train": reviews, "test": reviews[:9]},
        "tldr": {
            **{"train": summaries, "test": summaries[:9]},
            **{"preferences": pairs, "judge-preferences": [*pairs[:9], pairs[0] | {"rejected": pairs[0]["chosen"]}]},
        },
    }
    for task, parts in files.items():
        words = []
        for part, rows in parts.items():
            pl.DataFrame(rows).write_parquet(root / f"{task}-{part}.parquet")
            words += [f"--{part}", str(root / f"{task}-{part}.parquet")]
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(PAPER)
            patch.setattr(
                "sys.argv", ["prepare.py", task, *words, "--output", str(root / "runs" / "paper-data" / task)]
            )
            importlib.import_module("prepare").main()
            del sys.modules["prepare"]
    return root


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_the_paper_says(name: str) -> None:
    recipe = load_recipe(PAPER / f"{name}.yaml")
    assert (recipe.tau0, recipe.alpha, recipe.principles) == (0.2, 0.9, name.split("-")[0])
    assert recipe.sft is not None
    for stage in (recipe.sft, recipe.train):
        assert (stage.lora_rank, stage.lora_alpha, stage.full) == (8, 16, False)
    assert (recipe.train.objective, recipe.train.stable, recipe.train.without) == ("ple", False, None)
    longest = recipe.gen.max_query_tokens + recipe.gen.max_new_tokens
    if name.startswith("hh"):
        assert (recipe.gen.max_query_tokens, recipe.gen.max_new_tokens) == (256, 1024)
    else:
        assert longest == 1024 - 64  # GPT-2's positions, less 64 for the principle


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_whole_on_small_models(
    name: str,
    models: dict[str, str],
    data: Path,
    run_forked: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both rounds, then the evaluation and the judge of README.md. Only sizes and programs are other than shipped."""
    monkeypatch.setattr(rounds, "run_child", run_forked)
    recipe = small(load_recipe(PAPER / f"{name}.yaml"), models, data)
    rounds.run(recipe)
    pairs = pl.read_parquet(f"{recipe.run_dir}/data/pairs/**/*.parquet")
    assert pairs.height == 2 * recipe.queries_per_round
    assert pairs.select(pl.col("s", "s_prompt").is_finite().all()).row(0) == (True, True)
    assert Path(recipe.run_dir, "policy", "round=001", "adapter_model.safetensors").exists()


def small(recipe: Recipe, models: dict[str, str], data: Path) -> Recipe:
    """The recipe with small models and sizes, all in this environment, and its files under `data`."""
    values = recipe.model_dump(mode="json")
    values |= {"model": models[recipe.model], "rounds": 2, "queries_per_round": 8}
    values["gen"] |= {"command": ["ple-gen"], "engine": "hf", "max_new_tokens": 8}
    if recipe.reward_model:
        values["reward_model"] = models[recipe.reward_model]
    if recipe.reward:
        values["reward"]["model"] = models[recipe.reward.model]
    for key in ("queries", "run_dir"):
        values[key] = str(data / values[key])
    for stage in ("sft", "reward"):
        if values[stage]:
            values[stage]["data"] = str(data / values[stage]["data"])
    return parse_recipe(values, "test")
