"""The fused LoRA forward against peft's own: same outputs, same gradients, and hands off what it does not know."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from transformers.pytorch_utils import Conv1D

from ple_train.model.lora import FusedLinear, fuse
from ple_train.model.policy import load_policy

X = torch.linspace(-1, 1, 2 * 5 * 12, dtype=torch.float64).view(2, 5, 12)


class Layers(nn.Module):
    """A linear layer and GPT-2's transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 24), Conv1D(7, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.nn.functional.silu(self.first(x)))


def with_lora(dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = get_peft_model(Layers(), LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second"], **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros in a fresh adapter
            nn.init.normal_(parameter)
    return model.to(dtype)


def answer_and_gradients(model, x=X):
    x = x.clone().to(next(model.parameters()).dtype).requires_grad_()
    found = model(x)
    (found**2).sum().backward()
    return found, {"x": x.grad} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}])
def test_outputs_and_gradients_equal_those_of_peft(options):
    plain, fused = with_lora(**options), with_lora(**options)
    fuse(fused)
    for found, expected in zip(answer_and_gradients(fused), answer_and_gradients(plain), strict=True):
        torch.testing.assert_close(found, expected)


def test_in_bf16_results_and_gradients_are_as_near_to_float64_as_those_of_peft():
    exact, plain, fused = with_lora(), with_lora(torch.float32), with_lora(torch.float32)
    fuse(fused)
    result, gradients = answer_and_gradients(exact)
    expected = {"result": result} | gradients
    with torch.autocast("cpu", torch.bfloat16):
        found = [answer_and_gradients(model) for model in (fused, plain)]
    own, of_peft = ({"result": result} | gradients for result, gradients in found)
    for name, value in expected.items():
        assert (own[name] - value).norm() <= 1.5 * (of_peft[name] - value).norm(), name


def test_a_layer_that_is_trained_below_its_adapter_gets_its_gradient():
    plain, fused = with_lora(), with_lora()
    fuse(fused)
    for model in (plain, fused):
        model.base_model.model.first.base_layer.requires_grad_(True)
    for found, expected in zip(answer_and_gradients(fused), answer_and_gradients(plain), strict=True):
        torch.testing.assert_close(found, expected)


def test_frozen_bf16_weights_work_without_autocast_too():
    plain, fused = with_lora(torch.float32), with_lora(torch.float32)
    for model in (plain, fused):
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
    fuse(fused)
    found, expected = (model(X.bfloat16()) for model in (fused, plain))
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_an_adapter_that_is_off_changes_nothing():
    fused = with_lora()
    fuse(fused)
    with fused.disable_adapter():
        torch.testing.assert_close(fused(X), fused.get_base_model()(X))
        off = fused(X)
    assert (fused(X) - off).abs().max() > 0.1


def test_a_merged_or_second_adapter_is_answered_as_peft_does():
    plain, fused = with_lora(), with_lora()
    fuse(fused)
    for model in (plain, fused):
        model.add_adapter("second", LoraConfig(r=2, target_modules=["first", "second"]))
        model.to(torch.float64)
    torch.testing.assert_close(fused(X), plain(X))
    for model in (plain, fused):
        model.merge_adapter(["default"])
        assert model.base_model.model.first.merged
    torch.testing.assert_close(fused(X), plain(X))


def test_layers_that_are_not_plain_keep_the_forward_of_peft():
    dropping, plain = with_lora(lora_dropout=0.5), with_lora()
    fuse(dropping)
    fuse(plain)
    assert type(dropping.base_model.model.first) is Linear
    assert type(plain.base_model.model.first) is FusedLinear


def test_a_policy_to_train_is_fused(policy):
    assert any(isinstance(module, FusedLinear) for module in load_policy(str(policy)).modules())
