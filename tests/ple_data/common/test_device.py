"""Loading: no weight is made up, the same attention everywhere, padding that fits, one sentence for what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from ple_data.common import device
from ple_data.common.device import META, load_adapter, load_weights
from schemas.errors import UsageError
from tests import tiny

CPU = torch.device("cpu")
GONE = "model.layers.1.self_attn.k_proj.weight"


def damaged(model: Path, directory: Path, change) -> Path:
    copy = Path(shutil.copytree(model, directory))
    file = next(copy.glob("*.safetensors"))
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return copy


def with_config(model: Path, **values) -> Path:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))
    return model


@pytest.mark.parametrize("place", ["cpu", "meta"])  # meta: what is asked before vLLM starts
def test_a_weight_that_is_missing_or_of_another_shape_is_named(policy: Path, tmp_path: Path, place):
    lacking = damaged(policy, tmp_path / "lacking", lambda weights: weights.pop(GONE))
    with pytest.raises(UsageError, match=f"no trained LlamaForCausalLM: its files lack {GONE}, which would be random"):
        load_weights(AutoModelForCausalLM, str(lacking), torch.device(place), "no model")
    cut = damaged(policy, tmp_path / "cut", lambda weights: weights.update({GONE: weights[GONE][:8].clone()}))
    with pytest.raises(UsageError, match=rf"{GONE} \(\[8, 64\] instead of \[64, 64\]\)"):
        load_weights(AutoModelForCausalLM, str(cut), torch.device(place), "no model")


def test_a_head_may_be_new_where_a_command_adds_one_and_the_body_may_not(policy: Path, tmp_path: Path):
    with pytest.raises(UsageError, match=r"lack score\.weight"):
        load_weights(AutoModelForSequenceClassification, str(policy), CPU, "no model")
    assert load_weights(AutoModelForSequenceClassification, str(policy), CPU, "no model", head=True)
    lacking = damaged(policy, tmp_path / "lacking", lambda weights: weights.pop(GONE))
    with pytest.raises(UsageError, match=f"lack {GONE}"):
        load_weights(AutoModelForSequenceClassification, str(lacking), CPU, "no model", head=True)


def test_weights_of_layers_that_the_configuration_has_no_place_for_are_named(tmp_path: Path):
    deep = with_config(tiny.tiny_policy(tmp_path / "deep"), num_hidden_layers=1)
    with pytest.raises(UsageError, match=r"holds model\.layers\.1\..* and 6 more, for which its config\.json has no"):
        load_weights(AutoModelForCausalLM, str(deep), CPU, "no model")
    biased = with_config(tiny.tiny_policy(tmp_path / "biased", attention_bias=True), attention_bias=False)
    with pytest.raises(UsageError, match=r"holds model\.layers\.0\.self_attn\.k_proj\.bias"):
        load_weights(AutoModelForSequenceClassification, str(biased), CPU, "no model", head=True)


@pytest.mark.parametrize("name", ["0.self_attn.rotary_emb.inv_freq", "0.attn.masked_bias", "0.attn.bias"])
def test_masks_and_rotations_of_old_files_and_other_parts_do_no_harm(policy: Path, tmp_path: Path, name):
    more = {f"model.layers.{name}": torch.ones(2), "vision_tower.layers.0.fc.weight": torch.ones(2)}
    old = damaged(policy, tmp_path / "old", lambda weights: weights.update(more))
    assert load_weights(AutoModelForCausalLM, str(old), CPU, "no model")


def test_nothing_is_made_of_sizes_that_do_not_fit_the_files(tmp_path: Path, monkeypatch):
    places = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *words, device_map=None, **more: (
            places.append(device_map) or load(*words, device_map=device_map, **more)
        ),
    )
    vast = with_config(tiny.tiny_policy(tmp_path / "vast"), intermediate_size=9_000_000)
    with pytest.raises(UsageError, match=r"\(\[64, 128\] instead of \[64, 9000000\]\)"):
        load_weights(AutoModelForCausalLM, str(vast), CPU, "no model")
    assert places == [{"": META}]


@pytest.mark.parametrize(
    ("files", "config", "message"),
    [
        ({}, {"quantization_config": {"quant_method": "awq"}}, "is quantized .AWQ."),
        ({}, {"transformers_weights": "own.bin"}, r"names 'own\.bin'"),
        ({"adapter_config.json": "{}"}, {}, "holds an adapter: download it"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "a.bin"}}'}, {}, r"names 'a\.bin'"),
    ],
)
def test_what_is_refused_of_a_folder_is_refused_of_a_hub_id(tmp_path: Path, monkeypatch, files, config, message):
    def cached(model: str, name: str, **_: object) -> str | None:
        if name in files:
            (tmp_path / name).write_text(files[name])
        return str(tmp_path / name) if name in files else None

    monkeypatch.setattr(device, "cached_file", cached)
    with pytest.raises(UsageError, match=message):
        load_weights(AutoModelForCausalLM, "owner/name", CPU, "no model", config=LlamaConfig(**config))


def test_what_cannot_be_loaded_is_one_sentence(tmp_path: Path, policy: Path):
    model = with_config(Path(shutil.copytree(policy, tmp_path / "model")), num_attention_heads=0)
    with pytest.raises(UsageError) as found:
        load_weights(AutoModelForCausalLM, str(model), CPU, "no model there")
    assert len(str(found.value).splitlines()) == 1


def test_a_pad_id_outside_of_the_embedding_is_no_fault(tmp_path: Path):
    model = with_config(tiny.tiny_policy(tmp_path / "model"), pad_token_id=384)
    assert load_weights(AutoModelForCausalLM, str(model), CPU, "no model").config.pad_token_id is None


Q = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("made", "gone"),
    [
        ({}, [f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"]),
        ({"use_dora": True}, [f"{Q}.lora_magnitude_vector"]),
        ({"bias": "all"}, [f"{Q}.base_layer.bias"]),
        ({"bias": "all", "target_modules": ["v_proj"]}, [f"{Q}.bias"]),
        ({"bias": "lora_only"}, [f"{Q}.base_layer.bias"]),
        ({"modules_to_save": ["lm_head"]}, ["base_model.model.lm_head.weight"]),
        (
            {"trainable_token_indices": [1, 2]},
            ["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"],
        ),
    ],
    ids=str,
)
def test_a_weight_that_an_adapter_lacks_is_named(tmp_path: Path, place, made, gone):
    model = tiny.tiny_policy(tmp_path / "model", attention_bias=True)
    whole = tiny.tiny_adapter(model, tmp_path / "adapter", **made)
    load_adapter(load_weights(AutoModelForCausalLM, str(model), torch.device(place), "no model"), whole)
    lacking = damaged(whole, tmp_path / "lacking", lambda weights: [weights.pop(name) for name in gone])
    base = load_weights(AutoModelForCausalLM, str(model), torch.device(place), "no model")
    with pytest.raises(UsageError, match=rf"--adapter {lacking}") as found:
        load_adapter(base, lacking)
    assert gone[0].removesuffix(".weight") in str(found.value)


def test_a_weight_of_an_adapter_that_nothing_takes_is_named(policy: Path, adapter: Path, tmp_path: Path):
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    base = AutoModelForCausalLM.from_pretrained(policy)
    with pytest.raises(
        UsageError, match=r"holds .*\.mlp\.down_proj\.lora_A\.weight.* for which its configuration has no"
    ):
        load_adapter(base, copy)
