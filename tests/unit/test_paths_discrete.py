"""DDPM's table as a path, discrete times, and exact assignment."""

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from sixfold.paths.config import (
    DiscreteTimeConfig,
    OptimalTransportCouplingConfig,
    RectifiedFlowConfig,
    VPDiscreteConfig,
)
from sixfold.paths.couplings import coupled, optimal_assignment
from sixfold.paths.times import time_at_quantile


def build(config):
    return config.load()(config)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_the_path_passes_through_the_table_and_inverts(schedule):
    path = build(VPDiscreteConfig(schedule=schedule, steps=50))
    betas = {
        "linear": torch.linspace(1e-4, 0.02, 50, dtype=torch.float64),
        "scaled_linear": torch.linspace(1e-4**0.5, 0.02**0.5, 50, dtype=torch.float64) ** 2,
        "cosine": torch.tensor(
            [
                min(
                    1
                    - math.cos(((k + 1) / 50 + 0.008) / 1.008 * math.pi / 2) ** 2
                    / math.cos((k / 50 + 0.008) / 1.008 * math.pi / 2) ** 2,
                    0.999,
                )
                for k in range(50)
            ],
            dtype=torch.float64,
        ),
    }[schedule]
    time = (torch.arange(50, dtype=torch.float64) + 1) / 50
    at = path.coefficients(time)
    torch.testing.assert_close(at.alpha**2, torch.cumprod(1 - betas, 0))
    torch.testing.assert_close(at.alpha**2 + at.sigma**2, torch.ones_like(time))
    between = torch.linspace(0.001, 0.999, 77, dtype=torch.float64)
    at = path.coefficients(between)
    assert (at.alpha.diff() < 0).all()
    torch.testing.assert_close(path.time_at(at.alpha, at.sigma), between)
    torch.testing.assert_close(path.time_at(at.alpha.float(), at.sigma.float()), between.float(), rtol=0, atol=2e-5)


def test_rates_of_the_table_are_derivatives_within_a_step():
    path = build(VPDiscreteConfig(steps=10))
    time = ((torch.arange(10, dtype=torch.float64) + 0.5) / 10).requires_grad_()
    at = path.coefficients(time)
    (alpha_rate,) = torch.autograd.grad(at.alpha.sum(), time, retain_graph=True)
    (sigma_rate,) = torch.autograd.grad(at.sigma.sum(), time)
    torch.testing.assert_close(at.alpha_rate, alpha_rate)
    torch.testing.assert_close(at.sigma_rate, sigma_rate)


def test_discrete_times_are_the_steps_with_equal_probability():
    path = build(RectifiedFlowConfig())
    quantile = (torch.arange(4000) + 0.5) / 4000
    time = time_at_quantile(DiscreteTimeConfig(steps=8), path, quantile)
    values, counts = time.unique(return_counts=True)
    torch.testing.assert_close(values, torch.arange(1, 9) / 8)
    assert (counts == 500).all()


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_assignments_are_optimal(size):
    for seed in range(10):
        cost = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        if seed % 3 == 0:
            cost = cost.round()  # many ties
        column = optimal_assignment(cost)
        assert sorted(column.tolist()) == list(range(size))
        rows, columns = linear_sum_assignment(cost.numpy())
        assert cost[torch.arange(size), column].sum().item() == pytest.approx(cost.numpy()[rows, columns].sum())


def test_coupling_permutes_within_groups_of_positions_alone():
    generator = torch.Generator().manual_seed(1)
    data, noise = torch.randn(2, 24, 3, generator=generator)
    positions = torch.arange(1000 * 8, 1000 * 8 + 24)
    paired = coupled(OptimalTransportCouplingConfig(group=8), data, noise, positions)
    for start in (0, 8, 16):
        part = slice(start, start + 8)
        assert {tuple(row) for row in paired[part].tolist()} == {tuple(row) for row in noise[part].tolist()}
        _, columns = linear_sum_assignment(torch.cdist(data[part], noise[part]).square().numpy())
        torch.testing.assert_close(paired[part], noise[part][columns])
    alone = coupled(OptimalTransportCouplingConfig(group=8), data[8:16], noise[8:16], positions[8:16])
    assert torch.equal(alone, paired[8:16])
