"""The recipes of the paper: they parse, say what the paper says, and run whole on small models of the same kinds."""

import contextlib
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
import transformers
from click.testing import CliRunner

import cli
from ple_data.rewards.classifier import ClassifierReward
from ple_train.model.policy import load_policy
from ple_train.run import rounds
from ple_train.run.child import Ended
from schemas.options import Rewards, Trainable
from schemas.recipe import Recipe, load_recipe, parse_recipe
from tests import tiny
from tests.conftest import ROOT
from tests.forks import ForkServer
from tests.judgeserver import JudgeServer

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
    turns = [
        *(["Human", texts[n], "Assistant", texts[n + 16]] for n in range(16)),
        ["Human", texts[0], "Assistant", texts[1], "Human", texts[2], "Assistant", texts[3]],
        *(["Human", texts[n], "Human", texts[1], "Assistant", texts[2]] for n in range(7)),
        ["Human", "", "Assistant", "What?"],
    ]
    dialogues = [
        {
            "chosen": "".join(f"\n\n{who}: {said}" for who, said in zip(each[::2], each[1::2], strict=True)),
            "rejected": "",
        }
        for each in turns
    ]
    reviews = [{"text": f"{texts[n]} {texts[n + 9]}<br /><br />{texts[n]}", "label": n % 2} for n in range(60)]
    posts = [f"SUBREDDIT: r/a\n\nTITLE: {text}\n\nPOST: {text}\n\nTL;DR:" for text in texts]
    summaries = [{"prompt": posts[n], "completion": f" {texts[n + 3]}"} for n in range(60)]
    pairs = [{"prompt": posts[n], "chosen": said(texts[n]), "rejected": said(texts[n + 5])} for n in range(60)]
    files = {
        "hh": {"train": dialogues, "test": dialogues},
        "imdb": {"train": reviews, "test": reviews[:9]},
        "tldr": {
            **{"train": summaries, "test": summaries[:9], "preferences": pairs},
            "judge-preferences": [*pairs[:9], pairs[0] | {"rejected": pairs[0]["chosen"]}],
        },
    }
    for task, parts in files.items():
        words = []
        for part, rows in parts.items():
            pl.DataFrame(rows).write_parquet(root / f"{task}-{part}.parquet")
            words += [f"--{part}", str(root / f"{task}-{part}.parquet")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "sys.argv", ["prepare.py", task, *words, "--output", str(root / "runs" / "paper-data" / task)]
            )
            runpy.run_path(str(PAPER / "prepare.py"), run_name="__main__")
    return root


def said(text: str) -> list[dict[str, str]]:
    """A response as TRL's preferences have it."""
    return [{"role": "user", "content": "a post"}, {"role": "assistant", "content": text}]


def test_the_files_are_what_the_recipes_say(data: Path) -> None:
    prepared = data / "runs" / "paper-data"
    chats, texts = (pl.read_ndjson(prepared / "hh/sft-chat.jsonl"), pl.read_parquet(prepared / "hh/sft.parquet"))
    assert chats.height == texts.height == 24  # without the one that asks nothing
    assert texts["x"].str.ends_with("Assistant:").all()
    assert texts["y"].str.starts_with(" ").all()
    assert chats["y"].to_list() == texts["y"].str.strip_chars().to_list()
    assert [turn["role"] for turn in chats["messages"][16]] == ["user", "assistant", "user"]
    labelled, sft = (pl.read_parquet(prepared / "imdb" / f"{name}.parquet") for name in ("reward", "sft"))
    assert (labelled["label"].sum(), sft.height) == (30, 30)
    assert (sft["x"] + sft["y"]).to_list() == labelled.filter(label=1)["text"].to_list()
    assert not labelled["text"].str.contains("<br").any()
    pairs, judged = (pl.read_parquet(prepared / "tldr" / f"{name}preferences.parquet") for name in ("", "judge-"))
    assert (pairs.height, judged.height) == (60, 9)  # two equal answers say nothing
    assert pairs["chosen"].str.starts_with(" ").all()


@pytest.mark.parametrize("hub_id", ["weqweasdas/RM-Gemma-2B", "weqweasdas/RM-Mistral-7B"])
def test_rewards_are_those_of_the_whole_dialogue_alone(hub_id: str, models: dict[str, str]) -> None:
    """Padded on either side, by the model's own template, with one BOS; two turns of one speaker are joined."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(models[hub_id]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models[hub_id])
    rows = [("\n\nHuman: Why?\n\nAssistant:", " So."), ("\n\nHuman: Why?\n\nHuman: Is it long?\n\nAssistant:", " No.")]
    asked = ["Why?", "Why?\n\nIs it long?"]
    expected = []
    for question, (_, y) in zip(asked, rows, strict=True):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": y.strip()}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        assert text.startswith(tiny.BOS)
        with torch.no_grad():
            expected.append(model(**tokenizer(text.removeprefix(tiny.BOS), return_tensors="pt")).logits.item())
    assert ClassifierReward(models[hub_id], Rewards()).score(rows) == pytest.approx(expected, abs=1e-5)


def test_gpt2_trains_its_turned_weights_without_a_warning(models: dict[str, str]) -> None:
    policy = load_policy(models["openai-community/gpt2"], Trainable())
    found = {name.rsplit(".", 4)[1] for name, weight in policy.model.named_parameters() if weight.requires_grad}
    assert found == {"c_attn", "c_proj", "c_fc"}


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_the_paper_says(name: str) -> None:
    found = CliRunner().invoke(cli.ple, ["run", str(PAPER / f"{name}.yaml"), "--dry-run"])
    assert found.exit_code == 0, found.output
    recipe = load_recipe(PAPER / f"{name}.yaml")
    stages = [stage.title for stage in rounds.plan(recipe)]
    assert (
        len(found.stdout.splitlines()) == len(stages) == 3 * recipe.rounds + len(stages[: stages.index("round 0 gen")])
    )
    assert stages[: stages.index("round 0 gen")] == (["sft"] if name.startswith("hh") else ["reward", "sft"])
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
    forks: ForkServer,
    tmp_path: Path,
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
    asked = commands(name)
    assert len(asked) == {"hh-llama3": 3, "hh-qwen": 0, "imdb-gpt2": 1, "tldr-gpt2": 2}[name]
    with contextlib.closing(JudgeServer()) as server:
        for words in asked:
            words = [in_small(word, models, data) for word in words]
            if "judge" in words:
                words += ["--endpoint", server.url]
            log = tmp_path / "log"
            code, _ = forks.run(words, log, first="import os; os.environ |= " + repr(environment(data)))
            assert code == 0, log.read_text()


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


def commands(name: str) -> list[list[str]]:
    """The words of the `ple` commands of README.md that come after the run of a recipe."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (PAPER / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    text = next((block for block in blocks if f"ple run recipes/paper/{name}.yaml\n" in block), "")
    lines = [shlex.split(line) for line in text.replace("\\\n", " ").splitlines() if not line.startswith("#")]
    found = [line[1:] if line[0].startswith("IMDB_JUDGE=") else line for line in lines]
    assert all(Path(line[0]).name == "ple" for line in found)
    return [line[1:] for line in found if line[1] != "run"]


def in_small(word: str, models: dict[str, str], data: Path) -> str:
    """A word of a command with small models and sizes, and its files under `data`."""
    for hub_id, directory in models.items():
        word = word.replace(hub_id, directory)
    word = re.sub(r"(^|[=,])(runs/)", rf"\1{data}/\2", word).replace("round=004", "round=001")
    return {"2048": "6", "1024": "8", "896": "8", "704": "8", "50": "4", "MODEL": "m"}.get(word, word)


def environment(data: Path) -> dict[str, str]:
    return {"IMDB_JUDGE": f"{data}/runs/paper-data/imdb/judge.json", "ANTHROPIC_API_KEY": "k"}
