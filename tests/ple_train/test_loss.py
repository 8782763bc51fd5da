"""`ple_train.loss` against float64 computations written from the equations: plain Python where the math is ours."""

import math

import pytest
import torch

from ple_train import loss
from tests import oracle


def plain_token_logps(hidden, weight, targets, bias=None, scale=1.0, softcap=0.0):
    """The definition, all logits at once, in float64."""
    logits = hidden.double() @ weight.double().T
    logits = (logits if bias is None else logits + bias.double()) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


@pytest.mark.parametrize("extra", [{}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 1.7, "softcap": 3.0}])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("logits_per_chunk", [1, 37 * 5, 1 << 24])
def test_token_logps_and_gradients_equal_the_definition(extra, with_bias, logits_per_chunk, monkeypatch):
    monkeypatch.setitem(loss.LOGITS_PER_CHUNK, "cpu", logits_per_chunk)
    monkeypatch.setattr(loss, "ROWS_PER_CHUNK", 1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(37, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(37, generator=generator, dtype=torch.float64, requires_grad=True) if with_bias else None
    targets = torch.randint(0, 37, (23,), generator=generator)
    coefficients = torch.randn(23, generator=generator, dtype=torch.float64)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]

    found = loss.token_logps(hidden, weight, targets, bias, **extra)
    expected = plain_token_logps(hidden, weight, targets, bias, **extra)

    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found_grads = torch.autograd.grad((coefficients * found).sum(), leaves)
    expected_grads = torch.autograd.grad((coefficients * expected).sum(), leaves)
    torch.testing.assert_close(found_grads, expected_grads, rtol=1e-10, atol=1e-12)


def test_token_logps_in_float32_stay_within_1e_5_of_float64_at_qwens_vocabulary():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(40, 32, generator=generator, requires_grad=True)
    weight = torch.randn(151_936, 32, generator=generator) * 0.3
    targets = torch.randint(0, 151_936, (40,), generator=generator)

    found = loss.token_logps(hidden, weight, targets)
    expected = plain_token_logps(hidden, weight, targets)

    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    (found_grad,) = torch.autograd.grad(found.sum(), hidden)
    (expected_grad,) = torch.autograd.grad(expected.sum(), hidden)
    assert (found_grad - expected_grad).norm() / expected_grad.norm() < 1e-5


@pytest.mark.parametrize("rows_per_chunk", [10, 64])
def test_in_bf16_the_gradients_are_as_near_to_float64_as_those_of_the_plain_loss(rows_per_chunk, monkeypatch):
    """Of the hidden states and of an output layer that is trained, in one chunk and in seven, of which one is short."""
    monkeypatch.setitem(loss.LOGITS_PER_CHUNK, "cpu", 500 * rows_per_chunk)
    monkeypatch.setattr(loss, "ROWS_PER_CHUNK", 1)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(64, 32, generator=generator, requires_grad=True)
    weight = (torch.randn(500, 32, generator=generator) * 0.3).requires_grad_()
    bias = torch.randn(500, generator=generator, requires_grad=True)
    targets = torch.randint(0, 500, (64,), generator=generator)
    coefficients = torch.rand(64, generator=generator) / 37

    def plain(hidden, weight, targets, bias):
        logits = torch.nn.functional.linear(hidden, weight, bias).float()
        return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

    def gradients(logps):
        return torch.autograd.grad((coefficients * logps(hidden, weight, targets, bias)).sum(), (hidden, weight, bias))

    expected = gradients(plain_token_logps)
    with torch.autocast("cpu", torch.bfloat16):
        own, of_plain = gradients(loss.token_logps), gradients(plain)
    for found, other, exact in zip(own, of_plain, expected, strict=True):
        assert (found - exact).norm() <= 1.2 * (other - exact).norm()


def test_an_output_layer_alone_can_be_trained():
    hidden, weight = torch.randn(4, 8).double(), torch.randn(11, 8).double().requires_grad_()
    targets = torch.tensor([1, 2, 3, 4])
    (found,) = torch.autograd.grad(loss.token_logps(hidden, weight, targets).sum(), weight)
    (expected,) = torch.autograd.grad(plain_token_logps(hidden, weight, targets).sum(), weight)
    torch.testing.assert_close(found, expected)


def test_a_frozen_output_layer_gets_no_gradient():
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(11, 8)
    loss.token_logps(hidden, weight, torch.tensor([1, 2, 3, 4])).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def plain_reverse_kl(hidden, teacher, weight, bias=None, scale=1.0, softcap=0.0):
    """The definition, all logits at once, in float64."""

    def log_softmax(states):
        logits = states.double() @ weight.double().T
        logits = (logits if bias is None else logits + bias.double()) * scale
        return (softcap * torch.tanh(logits / softcap) if softcap else logits).log_softmax(-1)

    log_p, log_q = log_softmax(hidden), log_softmax(teacher.detach())
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("extra", [{}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 1.7, "softcap": 3.0}])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("logits_per_chunk", [1, 37 * 5, 1 << 24])
def test_reverse_kl_and_its_gradient_equal_the_definition(extra, with_bias, logits_per_chunk, monkeypatch):
    """Token by token, in five chunks of which one is short, and at once."""
    monkeypatch.setitem(loss.LOGITS_PER_CHUNK, "cpu", logits_per_chunk)
    monkeypatch.setattr(loss, "ROWS_PER_CHUNK", 1)
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(23, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    hidden.requires_grad_()
    weight = torch.randn(37, 16, generator=generator, dtype=torch.float64)
    bias = torch.randn(37, generator=generator, dtype=torch.float64) if with_bias else None
    coefficients = torch.randn(23, generator=generator, dtype=torch.float64)

    found = loss.reverse_kl(hidden, teacher, weight, bias, **extra)
    expected = plain_reverse_kl(hidden, teacher, weight, bias, **extra)

    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    (found_grad,) = torch.autograd.grad((coefficients * found).sum(), hidden)
    (expected_grad,) = torch.autograd.grad((coefficients * expected).sum(), hidden)
    torch.testing.assert_close(found_grad, expected_grad, rtol=1e-10, atol=1e-12)


def test_reverse_kl_equals_the_oracle():
    generator = torch.Generator().manual_seed(3)
    hidden, teacher, weight = (torch.randn(n, 8, generator=generator, dtype=torch.float64) * 3 for n in (5, 5, 29))
    logits = zip((hidden @ weight.T).tolist(), (teacher @ weight.T).tolist(), strict=True)
    expected = [oracle.reverse_kl(*both) for both in logits]
    assert loss.reverse_kl(hidden, teacher, weight).tolist() == pytest.approx(expected, rel=1e-10)


def test_reverse_kl_is_0_where_both_are_one_and_moves_nothing():
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8)
    found = loss.reverse_kl(hidden, hidden, weight)
    found.sum().backward()
    assert found.tolist() == [0.0] * 6
    assert hidden.grad.abs().max() == 0


def test_reverse_kl_in_bf16_is_as_near_to_float64_as_the_plain_loss():
    generator = torch.Generator().manual_seed(2)
    hidden, teacher = (torch.randn(64, 32, generator=generator) for _ in range(2))
    hidden.requires_grad_()
    weight = torch.randn(500, 32, generator=generator) * 0.3

    def plain(hidden, teacher, weight):
        log_p, log_q = (torch.nn.functional.linear(x, weight).float().log_softmax(-1) for x in (hidden, teacher))
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    def gradient(kl):
        return torch.autograd.grad(kl(hidden, teacher, weight).mean(), hidden)[0]

    exact = gradient(plain_reverse_kl)
    with torch.autocast("cpu", torch.bfloat16):
        own, other = gradient(loss.reverse_kl), gradient(plain)
        assert loss.reverse_kl(hidden, teacher, weight).dtype == torch.float32
    assert (own - exact).norm() <= 1.2 * (other - exact).norm()


def test_reverse_kl_refuses_an_output_layer_that_is_trained():
    hidden, weight = torch.randn(4, 8), torch.randn(11, 8, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient for the output layer: freeze it"):
        loss.reverse_kl(hidden, hidden, weight)


def test_weighted_loss_equals_the_oracle_of_eqs_3_4_6():
    """Three pairs at tau = 0.2: margin 1.0 (rank), margin exactly 0.2 and -0.7 (weighted SFT)."""
    pairs = [
        (0.0, 1.0, [-1.0, -2.5, -0.25], [-3.0, -0.5]),
        (0.0, 0.2, [-0.75], [-1.5, -1.25, -2.0]),
        (1.2, 0.5, [-4.0, -0.125], [-0.5]),
    ]
    sums, coefficients = [], []
    for s, s_prompt, logps, logps_prompt in pairs:
        row = oracle.row(s, s_prompt, len(logps), len(logps_prompt), tau=0.2)
        sums += [sum(logps), sum(logps_prompt)]
        coefficients += [row.c, row.c_prompt]

    found = loss.weighted_loss(
        torch.tensor(sums, dtype=torch.float64), torch.tensor(coefficients, dtype=torch.float64), pairs=3
    )

    assert float(found) == pytest.approx(oracle.batch_loss(pairs, tau=0.2), rel=1e-12)


def test_sft_loss_is_eq_1_divided_by_its_tokens():
    logps = [[-1.0, -2.0], [-0.5, -0.25, -4.0]]
    flat = torch.tensor([value for sequence in logps for value in sequence]).double()
    assert float(loss.sft_loss(flat, tokens=5)) == pytest.approx(oracle.sft_loss(logps) / 5)


def test_preference_loss_is_minus_log_sigmoid_of_the_margin():
    """-log sigmoid(2) = log(1 + e^-2); -log sigmoid(-1) = log(1 + e)."""
    found = loss.preference_loss(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0]), pairs=2)
    assert float(found) == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.e)) / 2)


def test_sum_by_response_adds_tokens_to_their_own_response():
    sums = loss.sum_by_response(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 2, 2, 0]), 3)
    assert sums.tolist() == [9.0, 0.0, 6.0]


def test_trust_region_stops_only_the_direction_that_has_gone_too_far():
    """Pushed down and fallen by 0.5, pushed down and risen, pushed up and risen, pushed up and fallen; then within."""
    coefficients = torch.tensor([-1.0, -1.0, 2.0, 2.0, -3.0, 3.0])
    drift = torch.tensor([-0.5, 0.5, 0.5, -0.5, -0.2, 0.2])
    assert loss.trust_region(coefficients, drift, 0.3).tolist() == [0.0, -1.0, 0.0, 2.0, -3.0, 3.0]
