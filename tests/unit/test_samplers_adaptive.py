"""The adaptive solver and the likelihood of the flow against what is known of Gaussian and mixed data."""

import math

import pytest
import torch

from exact_denoisers import ExactDenoiser, Unconditional, finite_posterior, gaussian_posterior
from sixfold.distributed.randomness import PositionRandom
from sixfold.errors import TrainingError, UserError
from sixfold.objectives.denoising.config import DenoisingConfig
from sixfold.paths.config import EDMPathConfig, VEConfig, VPCosineConfig, VPDiscreteConfig, VPLinearConfig
from sixfold.samplers.adaptive import RK45Sampler, integrate
from sixfold.samplers.config import RK45Config
from sixfold.samplers.contract import SampleRequest
from sixfold.samplers.likelihood import Likelihood

MEAN, STD = 0.15, 0.12
OBJECTIVES = {
    "rectified_flow": DenoisingConfig(),
    "vp_linear": DenoisingConfig(path=VPLinearConfig(), prediction="noise"),
    "vp_discrete": DenoisingConfig(path=VPDiscreteConfig(), prediction="noise"),
    "vp_cosine": DenoisingConfig(path=VPCosineConfig(), prediction="v"),
    "ve": DenoisingConfig(path=VEConfig(sigma_min=0.001), prediction="noise"),
    "edm": DenoisingConfig(path=EDMPathConfig(), prediction="edm"),
}


def test_a_linear_equation_is_solved_to_the_tolerance_sample_by_sample():
    """dy/du = rate y from 0 to 1, at rates that need very different steps."""
    rate = torch.tensor([0.1, -3.0, 40.0], dtype=torch.float64)
    start = torch.ones(3, 5, dtype=torch.float64)
    for rtol in (1e-4, 1e-7):
        (found,) = integrate(
            lambda state, u: (rate[:, None] * state[0],), (start,), 0.0, 1.0, rtol=rtol, atol=0.0, max_steps=1000
        )
        relative = (found / torch.exp(rate)[:, None] - 1).abs()
        assert relative.max() < 100 * rtol, relative
        assert relative.max() > 1e-3 * rtol  # not by taking far more steps than asked for


def test_the_error_falls_as_the_fifth_power_of_the_number_of_steps():
    def run(rtol):
        calls = []

        def field(state, u):
            calls.append(1)
            return (torch.cos(20 * u)[:, None] * state[0],)

        (found,) = integrate(
            field, (torch.ones(1, 1, dtype=torch.float64),), 0.0, 2.0, rtol=rtol, atol=0.0, max_steps=10_000
        )
        return (found.item() / math.exp(math.sin(40) / 20) - 1), len(calls)

    (loose, few), (tight, many) = run(1e-5), run(1e-10)
    order = math.log(abs(loose / tight)) / math.log(many / few)
    assert 4.0 < order < 6.5


def test_a_solver_that_does_not_arrive_says_so():
    with pytest.raises(TrainingError, match="without arriving"):
        integrate(
            lambda state, u: (torch.cos(1e4 * u)[:, None] * state[0],),
            (torch.ones(1, 1),),
            0.0,
            1.0,
            rtol=1e-6,
            atol=0.0,
            max_steps=20,
        )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_samples_follow_the_exact_flow_map(name):
    objective = OBJECTIVES[name]
    sampler = RK45Sampler(RK45Config(rtol=1e-5, atol=1e-5), objective, {"denoiser": Unconditional()})
    network = ExactDenoiser(objective, gaussian_posterior(MEAN, STD))
    numbers = torch.arange(16)
    image = sampler({"denoiser": network}, SampleRequest(seed=5, numbers=numbers, conditions={}))["image"]
    _, near_noise = sampler.interval()
    time, _ = sampler.scale(near_noise)
    at = sampler.path.coefficients(torch.tensor(time, dtype=torch.float64))
    x = at.sigma * PositionRandom(5, numbers).normal("sampling/noise", (1, 4, 4)).double()
    exact = MEAN + STD / (at.alpha**2 * STD**2 + at.sigma**2).sqrt() * (x - at.alpha * MEAN)
    assert (image - exact).abs().max() < 1e-3
    part = sampler({"denoiser": network}, SampleRequest(seed=5, numbers=numbers[5:], conditions={}))["image"]
    torch.testing.assert_close(part, image[5:], rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="its own steps"):
        sampler({"denoiser": network}, SampleRequest(seed=5, numbers=numbers, conditions={}, steps=10))


def bits_per_dim_error(objective, probes, exact_dimensions, count=64):
    likelihood = Likelihood(
        objective,
        {"denoiser": Unconditional()},
        solver=RK45Config(rtol=1e-5, atol=1e-5),
        exact_dimensions=exact_dimensions,
        probes=probes,
    )
    positions = torch.arange(count)
    x = MEAN + STD * PositionRandom(1, positions).normal("x", (1, 4, 4))
    network = ExactDenoiser(objective, gaussian_posterior(MEAN, STD))
    found = likelihood({"denoiser": network}, x, {}, PositionRandom(2, positions))
    exact = torch.distributions.Normal(MEAN, STD).log_prob(x.double()).flatten(1).sum(1)
    return (found - exact) / (16 * math.log(2))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_likelihood_of_gaussian_data_is_exact(name):
    assert bits_per_dim_error(OBJECTIVES[name], 1, 16, count=16).abs().max() < 0.01


def test_hutchinsons_estimate_is_exact_where_the_jacobian_is_diagonal():
    """v . D v with signs v is the trace of a diagonal D, whatever the signs."""
    assert bits_per_dim_error(DenoisingConfig(), 1, 0).abs().max() < 0.01


def test_hutchinsons_estimate_is_unbiased_and_sharpens_with_probes():
    points = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(3)) * 0.4
    objective = DenoisingConfig()
    network = ExactDenoiser(objective, finite_posterior(points, temperature=1.0))
    x = points[torch.arange(400) % 6] + 0.2 * torch.randn(400, 1, 2, 2, generator=torch.Generator().manual_seed(4))

    def found(exact_dimensions, probes):
        likelihood = Likelihood(
            objective,
            {"denoiser": Unconditional(size=2)},
            solver=RK45Config(rtol=1e-3, atol=1e-3, end_ratio=0.1),
            exact_dimensions=exact_dimensions,
            probes=probes,
        )
        return likelihood({"denoiser": network}, x, {}, PositionRandom(0, torch.arange(400)))

    exact, one, eight = found(4, 1), found(0, 1), found(0, 8)
    error = one - exact
    assert error.std() > 0.05  # the Jacobian is far from diagonal
    assert error.mean().abs() < 4 * error.std() / 20
    assert (eight - exact).std() < 0.5 * error.std()
