"""What is refused of a model or an adapter before it is loaded, how long its sequences may be, what pads."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, GPT2Config, LlamaConfig, MptConfig

from ple_data.common.models import check_adapter, check_model, load_tokenizer, pad_id, positions_of
from ple_train.engine.session import refuse_unfit
from schemas.errors import UsageError
from schemas.options import Lora
from tests import tiny


def scaled(kind: str, **more):
    rope = {"rope_type": kind, "rope_theta": 10000.0} | more
    return LlamaConfig(max_position_embeddings=128, rope_parameters=rope)


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (LlamaConfig(max_position_embeddings=128), 128),
        (GPT2Config(n_positions=128), 128),
        (MptConfig(max_seq_len=128), 128),
        (scaled("yarn", factor=4.0, original_max_position_embeddings=128), 512),
        (scaled("yarn", factor=4.0, original_max_position_embeddings=32), 128),
        (scaled("linear", factor=4.0), 128),  # deepseek-coder: it was trained at what it names
        (scaled("linear", factor=2.0, original_max_position_embeddings=128), 256),
        (scaled("dynamic", factor=2.0), 128),
        (
            scaled(
                "longrope",
                short_factor=[1.0] * 64,
                long_factor=[2.0] * 64,
                factor=4.0,
                original_max_position_embeddings=32,
            ),
            32,
        ),
        (
            scaled(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
            128,
        ),
        (AutoConfig.for_model("bloom"), None),
        (AutoConfig.for_model("bert", max_position_embeddings=128), 128),
        *(
            (AutoConfig.for_model(kind, max_position_embeddings=130, pad_token_id=1), 128)
            for kind in ("roberta", "mpnet")
        ),
        (AutoConfig.for_model("longformer", max_position_embeddings=131, pad_token_id=2), 128),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_positions_are_counted_by_one_rule(config, positions):
    assert positions_of(config) == positions


def test_what_pads_has_a_row_in_the_embedding(policy):
    tokenizer = load_tokenizer(policy)
    assert pad_id(tokenizer, 384) == tokenizer.pad_token_id
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert pad_id(tokenizer, tokenizer.pad_token_id) == tokenizer.eos_token_id
    assert pad_id(tokenizer, 1) == 0


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["GPTQ", "full precision"]),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, ["AWQ", "full precision"]),
        ({"transformers_weights": "../other/model.safetensors"}, ["../other/model.safetensors"]),
        ({"transformers_weights": "own.safetensors.index.json"}, ["own.safetensors.index.json"]),
        ({"num_hidden_layers": 10**12}, ["num_hidden_layers is more than 1000"]),
        ({"num_hidden_layers": 900}, ["900 layers", "there are 21 weights"]),
        ({"text_config": {"num_hidden_layers": 900}}, ["900 layers", "there are 21 weights"]),
        ({"num_labels": 10**9}, ["num_labels is more than 100000"]),
        ({"n_positions": 10**12}, ["n_positions is more than 100000000"]),
        ({"max_position_embeddings": 10**30}, ["max_position_embeddings is more than"]),
    ],
)
def test_configurations_that_are_refused(policy: Path, tmp_path: Path, settings, facts):
    model = Path(shutil.copytree(policy, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(UsageError) as found:
        check_model(model)
    assert all(fact in str(found.value) for fact in [str(model), *facts])
    if "quantization_config" in settings:
        check_model(model, quantized=True)


def test_a_text_config_that_is_no_object_is_not_looked_into(policy: Path, tmp_path: Path):
    model = Path(shutil.copytree(policy, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"text_config": [1]}))
    check_model(model)


@pytest.mark.parametrize("content", ["[]", '{"weight_map": []}', "[" * 100_000])
def test_an_index_of_weights_that_is_none(policy: Path, tmp_path: Path, content):
    model = Path(shutil.copytree(policy, tmp_path / "model"))
    (model / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UsageError, match=r"model\.safetensors\.index\.json (is no|holds a JSON list)"):
        check_model(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../other.safetensors", "/etc/other.safetensors", 3])
def test_an_index_that_names_a_pickle_or_a_file_elsewhere_is_refused(policy: Path, tmp_path: Path, name):
    model = Path(shutil.copytree(policy, tmp_path / "model"))
    (model / "pytorch_model.bin").write_bytes(b"never opened")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(UsageError, match=r"index\.json names .* read from \*\.safetensors beside it alone"):
        check_model(model)


def test_a_model_with_an_adapter_in_its_folder_is_refused(policy: Path, adapter: Path, tmp_path: Path):
    both = Path(shutil.copytree(policy, tmp_path / "both"))
    shutil.copytree(adapter, both, dirs_exist_ok=True)
    with pytest.raises(UsageError, match="holds a model and an adapter"):
        check_model(both)


def test_gguf_is_named(tmp_path: Path, policy: Path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for path in (file, tmp_path):
        with pytest.raises(UsageError, match="GGUF format"):
            check_model(path)
    shutil.copy(policy / "config.json", tmp_path)
    with pytest.raises(UsageError, match="GGUF format"):
        check_model(tmp_path)


# Adapters


def test_an_adapter_of_a_resized_embedding_names_both_sizes(policy: Path, tmp_path: Path):
    resized = tiny.tiny_adapter(policy, tmp_path / "resized", added=8)
    with pytest.raises(UsageError, match=r"of 380 x 64, which in .* is 372 x 64: give --model the resized model"):
        check_adapter(resized, policy)


@pytest.mark.parametrize("half", ["A", "B"])
def test_half_a_lora_pair_is_refused(policy: Path, adapter: Path, tmp_path: Path, half):
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    weights = load_file(copy / "adapter_model.safetensors")
    gone = f"base_model.model.model.layers.1.self_attn.q_proj.lora_{half}.weight"
    del weights[gone]
    save_file(weights, copy / "adapter_model.safetensors")
    with pytest.raises(UsageError, match=f"is unfinished: .* but no {gone}"):
        check_adapter(copy, policy)


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({}, None),
        ({"init_lora_weights": "gaussian"}, None),
        ({"init_lora_weights": "orthogonal"}, None),
        ({"bias": "all"}, "bias all"),
        ({"bias": "lora_only"}, "bias lora_only"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
        ({"init_lora_weights": "olora"}, "init_lora_weights olora"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights loftq"),
        *(
            (settings, None)
            for settings in (
                {"init_lora_weights": False},
                {"use_dora": True},
                {"use_rslora": True},
                {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4}},
                {"modules_to_save": ["lm_head"], "trainable_token_indices": [1]},
                {"layers_to_transform": [0, 1], "layers_pattern": "layers", "exclude_modules": ["lm_head"]},
                {"qalora_group_size": 16, "megatron_core": "megatron.core", "kasa_config": None, "arrow_config": {}},
            )
        ),
    ],
    ids=str,
)
def test_adapters_that_changed_the_base_are_known(policy: Path, adapter: Path, tmp_path: Path, settings, changed):
    assert check_adapter(with_settings(adapter, tmp_path, **settings), policy).changes_base == changed


def test_every_setting_of_peft_that_has_a_default_is_taken(policy: Path, adapter: Path, tmp_path: Path):
    from peft import LoraConfig

    check_adapter(with_settings(adapter, tmp_path, **LoraConfig(peft_type="LORA").to_dict()), policy)


@pytest.mark.parametrize("way", ["pissa_niter_4", "corda", "lora_ga", "of_next_year"])
def test_adapters_whose_base_cannot_be_made_again_are_refused(policy: Path, adapter: Path, tmp_path: Path, way):
    with pytest.raises(UsageError, match=f"init_lora_weights {way}.* path_initial_model_for_weight_conversion"):
        check_adapter(with_settings(adapter, tmp_path, init_lora_weights=way), policy)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "alora_invocation_tokens",
            "layer_replication",
            "megatron_config",
            "kasa_config",
            "arrow_config",
            "use_bdlora",
        ),
        *("velora_config", "use_qalora", "monteclora_config", "a_setting_of_next_year"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused(policy: Path, adapter: Path, tmp_path: Path, name):
    with pytest.raises(UsageError, match=name):
        check_adapter(with_settings(adapter, tmp_path, **{name: [[1]]}), policy)


@pytest.mark.parametrize("name", [[1], {"a": 1}, "x" * 300, "a\0b"], ids=["list", "object", "long", "NUL"])
def test_a_name_of_the_base_that_is_none_is_at_most_one_sentence(policy: Path, adapter: Path, tmp_path: Path, name):
    with contextlib.suppress(UsageError):  # some versions of Python say of the last two that there is no such directory
        check_adapter(with_settings(adapter, tmp_path, base_model_name_or_path=name), policy)


def test_an_adapter_that_does_not_name_rank_and_alpha_has_those_of_peft(policy: Path, adapter: Path, tmp_path: Path):
    copy = with_settings(adapter, tmp_path)
    config = json.loads((copy / "adapter_config.json").read_text())
    del config["lora_alpha"], config["r"]
    (copy / "adapter_config.json").write_text(json.dumps(config))
    info = check_adapter(copy, policy)
    assert (info.rank, info.alpha) == (8, 8)
    with pytest.raises(UsageError, match="has rank 8 and alpha 8, --lora-rank is 8 and --lora-alpha 16"):
        refuse_unfit(info, Lora(lora_rank=8, lora_alpha=16))


def with_settings(adapter: Path, tmp_path: Path, **settings) -> Path:
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | settings))
    return copy


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_file_that_never_ends_is_refused_before_it_is_opened(tmp_path, name):
    directory = tiny.tiny_policy(tmp_path / "model")
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    with pytest.raises(UsageError, match=f"{name} is a pipe or device"):
        check_model(directory)


def test_a_folder_that_its_owner_lacks_is_said_to_be_looked_up_on_the_hub(tmp_path, monkeypatch, capsys):
    """A slip in the name of one's own folder has the form of a hub id: the hub is asked, for a minute where it cannot
    be reached."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "policy").mkdir(parents=True)
    check_model("demo/polcy")
    assert capsys.readouterr().err == "note: the folder demo has no polcy, so demo/polcy is looked up on the hub\n"
    check_model("Qwen/Qwen2.5-0.5B")
    check_model("gpt2")
    assert not capsys.readouterr().err
