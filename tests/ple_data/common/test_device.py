"""Loading: no weight is made up, the same attention everywhere, padding that fits, one sentence for what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ple_data.common.device import load_adapter, load_weights
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


@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta: what is asked before vLLM starts
def test_a_weight_that_is_missing_or_of_another_shape_is_named(policy: Path, tmp_path: Path, device):
    lacking = damaged(policy, tmp_path / "lacking", lambda weights: weights.pop(GONE))
    with pytest.raises(UsageError, match=f"no trained LlamaForCausalLM: its files lack {GONE}, which would be random"):
        load_weights(AutoModelForCausalLM, str(lacking), torch.device(device), "no model")
    cut = damaged(policy, tmp_path / "cut", lambda weights: weights.update({GONE: weights[GONE][:8].clone()}))
    with pytest.raises(UsageError, match=rf"{GONE} \(\[8, 64\] instead of \[64, 64\]\)"):
        load_weights(AutoModelForCausalLM, str(cut), torch.device(device), "no model")


def test_a_head_may_be_new_where_a_command_adds_one_and_the_body_may_not(policy: Path, tmp_path: Path):
    with pytest.raises(UsageError, match=r"lack score\.weight"):
        load_weights(AutoModelForSequenceClassification, str(policy), CPU, "no model")
    assert load_weights(AutoModelForSequenceClassification, str(policy), CPU, "no model", head=True)
    lacking = damaged(policy, tmp_path / "lacking", lambda weights: weights.pop(GONE))
    with pytest.raises(UsageError, match=f"lack {GONE}"):
        load_weights(AutoModelForSequenceClassification, str(lacking), CPU, "no model", head=True)


def test_what_cannot_be_loaded_is_one_sentence(tmp_path: Path, policy: Path):
    model = Path(shutil.copytree(policy, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))
    with pytest.raises(UsageError) as found:
        load_weights(AutoModelForCausalLM, str(model), CPU, "no model there")
    assert len(str(found.value).splitlines()) == 1


def test_a_pad_id_outside_of_the_embedding_is_no_fault(tmp_path: Path):
    model = tiny.tiny_policy(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"pad_token_id": 384}))
    assert load_weights(AutoModelForCausalLM, str(model), CPU, "no model").config.pad_token_id is None


def test_a_weight_that_an_adapter_lacks_is_named(policy: Path, adapter: Path, tmp_path: Path):
    def drop(weights):
        for half in "AB":
            weights.pop(f"base_model.model.model.layers.1.self_attn.k_proj.lora_{half}.weight")

    lacking = damaged(adapter, tmp_path / "lacking", drop)
    base = AutoModelForCausalLM.from_pretrained(policy)
    with pytest.raises(UsageError, match=r"does not fit this --model \(Found missing adapter keys.*k_proj\.lora_A"):
        load_adapter(base, lacking)
