"""Each objective on pairs against its formula in plain floats: value, slopes, where it rests and what bounds it."""

import math
from typing import get_args

import numpy as np
import pytest
import torch

from ple_train.objectives import loss_on_pairs
from ple_train.objectives.pair_loss import Knobs, Pairs
from schemas.options import OBJECTIVE_KINDS, ObjectiveName
from tests import oracle

NAMES = get_args(ObjectiveName)
OTHERS = [name for name in NAMES if name != "ple"]
N = 200
TAU = 0.2


def random_pairs(form: str = "sums", seed: int = 0) -> Pairs:
    """Ties among them, and log-ratios on both sides of the start policy."""
    numbers = np.random.default_rng(seed)
    lengths = numbers.integers(1, 40, (N, 2))
    start = -numbers.gamma(2, 1.5, (N, 2)) * lengths
    moved = numbers.normal(0, 0.5, (N, 2)) * (lengths if form == "means" else 6)
    moved[::10] = 0.0  # as where training begins
    margin = np.where(numbers.random(N) < 0.1, 0.0, numbers.normal(0, 2, N))

    def tensor(values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    logps = tensor(start + moved).requires_grad_()
    coefficients, quantiles = tensor(numbers.normal(size=(N, 2))), tensor(numbers.random((N, 2)))
    return Pairs(logps, tensor(start), tensor(lengths), coefficients, quantiles, tensor(margin), form)


def expected(name: str, pairs: Pairs, at: int, knobs: Knobs) -> tuple[float, float, float]:
    lengths = pairs.lengths[at].tolist() if pairs.form == "means" else (1, 1)
    ratio = (pairs.logps - pairs.start)[at].tolist()
    d, d_prompt = ratio[0] / lengths[0], ratio[1] / lengths[1]
    margin, beta = pairs.margin[at].item(), knobs.beta
    value, *slopes = {
        "ple-residual": lambda: oracle.residual(margin, d, d_prompt, knobs.tau, beta),
        "dpo": lambda: oracle.dpo(margin, d, d_prompt, beta, knobs.label_smoothing),
        "ipo": lambda: oracle.ipo(margin, d, d_prompt, beta),
        "rebel": lambda: oracle.rebel(margin, d, d_prompt, beta),
        "apo": lambda: oracle.apo(margin, d, d_prompt, beta),
        "topr": lambda: oracle.topr(margin, d, d_prompt),
        "qrpo": lambda: oracle.qrpo(*pairs.quantiles[at].tolist(), d, d_prompt, beta),
    }[name]()
    return value, slopes[0] / lengths[0], slopes[1] / lengths[1]


@pytest.mark.parametrize("name", OTHERS)
def test_value_and_slopes_are_those_of_the_formula(name):
    loss = loss_on_pairs(name)
    for form, beta in OBJECTIVE_KINDS[name].betas.items():
        pairs = random_pairs(form)
        knobs = Knobs(TAU, 1.0 if beta is None else beta, 0.1 if name == "dpo" else 0.0)
        losses = loss(pairs, knobs)
        (slopes,) = torch.autograd.grad(losses.sum(), pairs.logps)
        for at in range(N):
            value, *by_arm = expected(name, pairs, at, knobs)
            assert losses[at].item() == pytest.approx(value, rel=1e-8, abs=1e-8)
            assert slopes[at].tolist() == pytest.approx(by_arm, rel=1e-8, abs=1e-8)


def test_the_printed_loss_has_the_coefficients_as_its_slopes():
    pairs = random_pairs()
    losses = loss_on_pairs("ple")(pairs, Knobs())
    (slopes,) = torch.autograd.grad(losses.sum(), pairs.logps)
    assert torch.equal(slopes, -pairs.coefficients)
    assert losses[3].item() == pytest.approx(-(pairs.coefficients[3] @ pairs.logps[3]).item())


@pytest.mark.parametrize("name", OTHERS)
def test_a_loss_is_bounded_below_where_the_printed_one_is_not(name):
    """Whatever a policy makes of the responses: log-probabilities from -1e4 to 0 a response."""
    loss = loss_on_pairs(name)
    for form, beta in OBJECTIVE_KINDS[name].betas.items():
        pairs = random_pairs(form)
        wild = torch.linspace(-1e4, 0, N, dtype=torch.float64)
        wild = torch.stack([wild, wild.flip(0)], 1)
        knobs = Knobs(TAU, 1.0 if beta is None else beta)
        for logps in (wild, wild.flip(1)):
            losses = loss(Pairs(logps, *list(vars(pairs).values())[1:]), knobs)
            assert torch.isfinite(losses).all()
            room = (pairs.margin.abs() / 2 * -pairs.start.min(1).values) if name == "topr" else torch.zeros(N)
            assert (losses >= -room - 1e-9).all()


@pytest.mark.parametrize("name", [name for name in OTHERS if OBJECTIVE_KINDS[name].stops])
def test_a_pair_rests_where_beta_times_delta_is_its_margin(name):
    loss = loss_on_pairs(name)
    pairs = random_pairs("means")
    beta = 1.5
    prompted = pairs.start[:, 1] + pairs.lengths[:, 1] * (
        pairs.margin / beta + ((pairs.logps - pairs.start)[:, 0] / pairs.lengths[:, 0])
    )
    logps = torch.stack([pairs.logps[:, 0], prompted], 1).detach().requires_grad_()
    losses = loss(Pairs(logps, *list(vars(pairs).values())[1:]), Knobs(TAU, beta))
    (slopes,) = torch.autograd.grad(losses.sum(), logps)
    assert slopes.abs().max() < 1e-9
    assert losses.abs().max() < 1e-9


def test_the_residual_loss_at_the_start_policy_is_eqs_3_to_5_by_token():
    """Rank set with the coefficients 1/len, weighted SFT with tanh(margin / 2) / len: the normalised printed loss."""
    pairs = random_pairs("means")
    start = Pairs(pairs.start.clone().requires_grad_(), *list(vars(pairs).values())[1:])
    losses = loss_on_pairs("ple-residual")(start, Knobs(TAU, 3.0))
    (slopes,) = torch.autograd.grad(losses.sum(), start.logps)
    for at in range(N):
        lengths = [int(length) for length in pairs.lengths[at]]
        row = oracle.row(0.0, pairs.margin[at].item(), *lengths, TAU, normalize_wsft=True)
        assert slopes[at].tolist() == pytest.approx([-row.c, -row.c_prompt], abs=1e-12)


@pytest.mark.parametrize(("tau", "weighted"), [(math.inf, True), (TAU, False)])
def test_a_term_of_the_residual_loss_can_be_left_out(tau, weighted):
    pairs = random_pairs("means")
    losses = loss_on_pairs("ple-residual")(pairs, Knobs(tau, 1.5, weighted=weighted))
    (slopes,) = torch.autograd.grad(losses.sum(), pairs.logps)
    residual = pairs.margin - 1.5 * pairs.delta
    pull = torch.where(residual > tau, 1.0, torch.tanh(residual / 2) if weighted else torch.zeros(N)).detach()
    torch.testing.assert_close(slopes, torch.stack([pull, -pull], 1) / pairs.lengths, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OTHERS)
def test_far_log_ratios_make_no_nan_in_float32(name):
    loss = loss_on_pairs(name)
    pairs = random_pairs()
    logps = torch.full((N, 2), -1e5)
    logps[::2, 0] = 0.0
    logps.requires_grad_()
    values = [v.float() if isinstance(v, torch.Tensor) else v for v in list(vars(pairs).values())[1:]]
    losses = loss(Pairs(logps, *values), Knobs(TAU, OBJECTIVE_KINDS[name].betas["sums"] or 1.0))
    (slopes,) = torch.autograd.grad(losses.sum(), logps)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(slopes).all()
