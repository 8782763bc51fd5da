"""`ple_train.attention` against plain float64 attention, one sequence at a time: values and gradients."""

import pytest
import torch

from ple_train.attention import Packing, packed_attention

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


def test_what_it_does_not_know_is_refused():
    q = torch.zeros(1, HEADS, 3, WIDTH)
    for unknown in ({"softcap": 1.0}, {"s_aux": q}, {"attention_mask": q}):
        with pytest.raises(ValueError, match="does not know"):
            packed_attention(torch.nn.Identity(), q, q, q, **{"attention_mask": None, **unknown})
