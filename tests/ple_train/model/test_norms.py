"""Fused RMS norms against transformers' own: same outputs and gradients, and nothing else is taken for one."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ple_train.model.norms import fuse_norms

SIZES = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}


def norm(dtype: torch.dtype) -> LlamaRMSNorm:
    torch.manual_seed(0)
    module = LlamaRMSNorm(48, eps=1e-5)
    torch.nn.init.normal_(module.weight)
    return module.to(dtype)


def answer_and_gradients(module, x):
    x = x.clone().requires_grad_()
    found = module(x)
    (found.float() ** 2).sum().backward()
    return found, x.grad, module.weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_transformers(dtype):
    own, fused = norm(dtype), norm(dtype)
    fuse_norms(fused)
    assert type(fused) is not LlamaRMSNorm
    assert isinstance(fused, LlamaRMSNorm)
    x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for found, expected in zip(answer_and_gradients(fused, x), answer_and_gradients(own, x), strict=True):
        torch.testing.assert_close(found, expected, **close)


def test_a_norm_whose_weight_is_in_parts_is_found_and_keeps_it(tmp_path):
    fused = norm(torch.float32)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store")), rank=0, world_size=1)
    try:
        kept = distribute_tensor(fused.weight.detach(), init_device_mesh("cpu", (1,)))
        fused.weight = torch.nn.Parameter(kept)
        fuse_norms(fused)
        assert type(fused) is not LlamaRMSNorm
        assert torch.equal(fused.weight.full_tensor(), norm(torch.float32).weight)
    finally:
        dist.destroy_process_group()


def test_one_number_type_in_and_out_under_autocast_too():
    fused = norm(torch.bfloat16)
    fuse_norms(fused)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(torch.ones(2, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_other_number_types_than_the_weights_are_left_to_transformers():
    own, fused = norm(torch.float32), norm(torch.float32)
    fuse_norms(fused)
    x = torch.randn(2, 48).bfloat16()
    assert torch.equal(fused(x), own(x))
    assert fused(x).dtype == own(x).dtype


@pytest.mark.parametrize(
    ("config", "norms"),
    [
        (LlamaConfig(**SIZES), 5),
        (Qwen3Config(**SIZES), 9),  # of queries and keys too
        (Gemma2Config(**SIZES), 0),  # weights less 1
        (CohereConfig(**SIZES), 0),  # less the mean
        (GPT2Config(**GPT2), 0),
    ],
)
def test_every_rms_norm_of_a_model_and_no_other(config, norms):
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(3, 20)[None]
    before = model(ids).logits
    fuse_norms(model)
    assert sum(type(module).__name__ == "FusedNorm" for module in model.modules()) == norms
    torch.testing.assert_close(model(ids).logits, before)
    assert model.state_dict().keys() == AutoModelForCausalLM.from_config(config).state_dict().keys()
