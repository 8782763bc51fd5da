"""What is refused of a model or an adapter before it is loaded, how long its sequences may be, what pads."""

import json
import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, GPT2Config, LlamaConfig, MptConfig

from ple_data.common.models import check_adapter, check_model, load_tokenizer, pad_id, positions_of
from schemas.errors import UsageError
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
        (scaled("linear", factor=2.0), 256),
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
    ],
)
def test_adapters_that_changed_the_base_are_known(policy: Path, adapter: Path, tmp_path: Path, settings, changed):
    assert check_adapter(with_settings(adapter, tmp_path, **settings), policy).changes_base == changed


@pytest.mark.parametrize("way", ["pissa_niter_4", "corda", "lora_ga"])
def test_adapters_whose_base_cannot_be_made_again_are_refused(policy: Path, adapter: Path, tmp_path: Path, way):
    with pytest.raises(UsageError, match=f"init_lora_weights {way}.* path_initial_model_for_weight_conversion"):
        check_adapter(with_settings(adapter, tmp_path, init_lora_weights=way), policy)


@pytest.mark.parametrize("name", ["alora_invocation_tokens", "layer_replication", "megatron_config"])
def test_adapters_that_are_no_plain_lora_are_refused(policy: Path, adapter: Path, tmp_path: Path, name):
    with pytest.raises(UsageError, match=name):
        check_adapter(with_settings(adapter, tmp_path, **{name: [[1]]}), policy)


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
