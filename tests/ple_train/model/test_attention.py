"""`ple_train.model.attention` against plain float64 attention, one sequence at a time: values and gradients."""

import sys
from types import ModuleType

import pytest
import torch

from ple_train.model import attention
from ple_train.model.attention import Packing, in_one_call, packed_attention, varlen_attention, varlen_kernel

HEADS, WIDTH = 4, 8
PARTS = [(5, 7, 3), (0, 6), (2, 1, 4, 4)]
"""For each part the length of a prompt and of every response behind it."""


def plainly(query, key, value, window):
    """[heads, n, d] each, one causal sequence."""
    scores = query @ key.mT / WIDTH**0.5
    distance = torch.arange(len(query[0]))[:, None] - torch.arange(len(query[0]))
    hidden = (distance < 0) | (distance >= (window or len(query[0])))
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value


def one_by_one(query, key, value, window):
    """As `packed_attention`: [1, heads, tokens, d] → [1, tokens, heads, d]; each prompt once, before its responses."""
    key, value = (tensor.repeat_interleave(HEADS // tensor.shape[1], dim=1) for tensor in (key, value))
    start, outputs = 0, []
    for prompt, *responses in PARTS:
        place = start + prompt
        for number, length in enumerate(responses):
            own = [*range(start, start + prompt), *range(place, place + length)]
            answer = plainly(*(tensor[0][:, own] for tensor in (query, key, value)), window)
            outputs.append(answer if number == 0 else answer[:, prompt:])
            place += length
        start = place
    return torch.cat(outputs, dim=1).transpose(0, 1)[None]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
def test_packed_branches_equal_plain_attention_one_by_one(dtype, tolerance, kv_heads, window):
    torch.manual_seed(0)
    tokens = sum(map(sum, PARTS))
    leaves = [torch.randn(1, heads, tokens, WIDTH).to(dtype).requires_grad_() for heads in (HEADS, kv_heads, kv_heads)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    weights = torch.randn(1, tokens, HEADS, WIDTH)
    packing = Packing.of(PARTS, torch.device("cpu"))

    found, _ = packed_attention(torch.nn.Identity(), *leaves, None, packing=packing, sliding_window=window)
    expected = one_by_one(*exact, window)

    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    found_gradients = torch.autograd.grad((found * weights.to(dtype)).sum(), leaves)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), exact)
    for own, other in zip(found_gradients, expected_gradients, strict=True):
        assert (own - other).norm() <= 2 * tolerance * other.norm()


def plain_kernel(query, key, value, packing, scale, window):
    """What `Kernel` promises, in a loop. It stands in for the real kernels, which need a GPU."""
    key, value = (tensor.repeat_interleave(HEADS // tensor.shape[1], dim=1) for tensor in (key, value))
    outputs = []
    for at in range(len(packing.borders_q) - 1):
        own = slice(*packing.borders_q[at : at + 2].tolist())
        seen = slice(*packing.borders_k[at : at + 2].tolist())
        q, k, v = (tensor.transpose(0, 1) for tensor in (query[own], key[seen], value[seen]))
        queries, keys = q.shape[1], k.shape[1]
        assert queries <= packing.longest_q
        assert keys <= packing.longest_k
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        hidden = (distance < 0) | (distance >= (window or keys))
        outputs.append(((q @ k.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    assert packing.borders_q.dtype == packing.borders_k.dtype == torch.int32
    return torch.cat(outputs)


def both_ways(parts, attend_packed, attend_varlen, dtype, device="cpu"):
    """Values and gradients of the loop and of one call on the same random numbers."""
    torch.manual_seed(0)
    tokens, packing = sum(map(sum, parts)), Packing.of(parts, torch.device(device))
    leaves = [torch.randn(1, heads, tokens, WIDTH, device=device, dtype=dtype) for heads in (HEADS, 2, 2)]
    weights = torch.randn(1, tokens, HEADS, WIDTH, device=device, dtype=dtype)
    found = []
    for attend in (attend_packed, attend_varlen):
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        values = attend(*own, packing)
        found.append([values, *torch.autograd.grad((values * weights).sum(), own)])
    return found


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("parts", [PARTS, [(0, 7), (3, 2)], [(5, 1, 1, 1, 1), (0, 1)]])
def test_one_call_sees_what_the_loop_sees(parts, window):
    """Which keys each span is given, and where its queries stand among them; the kernel is a plain one, in float64."""

    def loop(q, k, v, packing):
        return packed_attention(torch.nn.Identity(), q, k, v, None, packing=packing, sliding_window=window)[0]

    def once(q, k, v, packing):
        return in_one_call(plain_kernel, q, k, v, packing, WIDTH**-0.5, window)

    expected, found = both_ways(parts, loop, once, torch.float64)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


def test_without_shared_prompts_no_key_is_copied():
    assert Packing.of([(0, 7), (3, 2)], torch.device("cpu")).keys is None
    assert Packing.of([(2, 1, 3)], torch.device("cpu")).keys.tolist() == [0, 1, 2, 0, 1, 3, 4, 5]


def called(kernel, window):
    """With what a kernel's function is called, its tensors left out."""
    packing = Packing.of([(2, 1, 3)], torch.device("cpu"))
    q, k, v, *borders, more = kernel("q", "k", "v", packing, 0.5, window)
    assert (q, k, v) == ("q", "k", "v")
    assert [border.tolist() for border in borders[:2]] == [[0, 3, 6], [0, 3, 8]]
    assert borders[2:] == [3, 5]
    return more


@pytest.mark.parametrize(("window", "sides"), [(None, (-1, 0)), (4, (3, 0))])
def test_kernels_are_asked_for_causal_attention_in_the_models_window(monkeypatch, window, sides):
    """Of torch 2.10, which cannot scale, 2.11, which takes grouped heads unasked, and 2.13; and flash-attention's."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def of_2_13(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        return q, k, v, cu_q, cu_k, max_q, max_k, {"scale": scale, "window_size": window_size, "gqa": enable_gqa}

    def of_2_11(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return q, k, v, cu_q, cu_k, max_q, max_k, {"scale": scale, "window_size": window_size}

    def of_2_10(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
        raise AssertionError

    expected = {"scale": 0.5, "window_size": sides}
    monkeypatch.setattr(varlen, "varlen_attn", of_2_13)
    assert called(attention._torchs_kernel(), window) == expected | {"gqa": True}
    monkeypatch.setattr(varlen, "varlen_attn", of_2_11)
    assert called(attention._torchs_kernel(), window) == expected
    monkeypatch.setattr(varlen, "varlen_attn", of_2_10)
    assert attention._torchs_kernel() is None

    flash = ModuleType("flash_attn")
    flash.flash_attn_varlen_func = lambda *given, **more: (*given, more)
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    expected = {"softmax_scale": 0.5, "causal": True, "window_size": sides}
    assert called(attention._flash_attentions_kernel(), window) == expected


@pytest.mark.skipif(not torch.cuda.is_available() or varlen_kernel() is None, reason="needs a GPU and its kernels")
@pytest.mark.parametrize("window", [None, 4])
def test_the_kernel_of_a_gpu_equals_the_loop(window):
    def loop(q, k, v, packing):
        return packed_attention(torch.nn.Identity(), q, k, v, None, packing=packing, sliding_window=window)[0]

    def once(q, k, v, packing):
        return varlen_attention(torch.nn.Identity(), q, k, v, None, packing=packing, sliding_window=window)[0]

    expected, found = both_ways(PARTS, loop, once, torch.bfloat16, "cuda")
    for own, other in zip(found, expected, strict=True):
        assert (own - other).norm() <= 0.01 * other.norm()


def test_one_call_is_refused_where_there_is_no_kernel():
    q, packing = torch.zeros(1, HEADS, 3, WIDTH), Packing.of([(0, 3)], torch.device("cpu"))
    with pytest.raises(ValueError, match="needs a GPU"):
        varlen_attention(torch.nn.Identity(), q, q, q, None, packing=packing)


def test_what_it_does_not_know_is_refused():
    q = torch.zeros(1, HEADS, 3, WIDTH)
    for unknown in ({"softcap": 1.0}, {"s_aux": q}, {"attention_mask": q}):
        with pytest.raises(ValueError, match="does not know"):
            packed_attention(torch.nn.Identity(), q, q, q, **{"attention_mask": None, **unknown})
        with pytest.raises(ValueError, match="does not know"):
            varlen_attention(torch.nn.Identity(), q, q, q, **{"attention_mask": None, **unknown})
