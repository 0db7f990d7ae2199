"""DPM-Solver++ by its order, stochastic samplers by their moments, all of them by what they share."""

import math

import pytest
import torch

from exact_denoisers import ExactDenoiser, Unconditional, gaussian_posterior
from sixfold.distributed.randomness import PositionRandom
from sixfold.objectives.denoising.config import DenoisingConfig
from sixfold.paths.config import EDMPathConfig, RectifiedFlowConfig, VEConfig, VPCosineConfig, VPLinearConfig
from sixfold.paths.predictions import Endpoints
from sixfold.samplers.config import (
    AncestralConfig,
    DDIMConfig,
    DPMSolverConfig,
    EDMGridConfig,
    EulerConfig,
    ReverseSDEConfig,
    UniformGridConfig,
)
from sixfold.samplers.contract import SampleRequest
from sixfold.samplers.denoising import knots_at
from sixfold.samplers.grids import solver_times
from sixfold.samplers.reverse_sde import solve_reverse_sde
from sixfold.samplers.stochastic import solve_ancestral, solve_ddim

MEAN, STD = 0.15, 0.12  # so that samples stay within [-1, 1], where images are clamped
PATHS = [
    RectifiedFlowConfig(),
    VPLinearConfig(),
    VPCosineConfig(),
    VEConfig(sigma_min=1e-4, sigma_max=20.0),
    EDMPathConfig(sigma_min=1e-4),
]
STOCHASTIC = [
    DDIMConfig(eta=1.0),
    DDIMConfig(eta=0.5),
    AncestralConfig(),
    AncestralConfig(variance="forward"),
    ReverseSDEConfig(),
    ReverseSDEConfig(corrector_steps=1),
]
NAMES = ["ddim", "ddim_half", "ancestral", "ancestral_forward", "sde", "predictor_corrector"]


def draw(config, objective, count=16, start=0):
    sampler = config.load()(config, objective, {"denoiser": Unconditional()})
    network = ExactDenoiser(objective, gaussian_posterior(MEAN, STD))
    numbers = torch.arange(start, start + count)
    return sampler({"denoiser": network}, SampleRequest(seed=5, numbers=numbers, conditions={}))["image"]


def objective_on(path):
    return DenoisingConfig(path=path, prediction="velocity" if path.type == "rectified_flow" else "data")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.type)
def test_dpm_solver_converges_to_the_exact_flow_map_at_second_order(path):
    objective = objective_on(path)
    grid = EDMGridConfig(sigma_min=1e-3, sigma_max=20.0, rho=40.0)  # nearly even in the log of the ratio
    errors = []
    for steps in (40, 80, 160):
        config = DPMSolverConfig(steps=steps, grid=grid)
        at = objective.path.load()(path).coefficients(
            solver_times(grid, objective.path.load()(path), steps, needs_signal=False)[0]
        )
        x = at.sigma * PositionRandom(5, torch.arange(16)).normal("sampling/noise", (1, 4, 4)).double()
        exact = MEAN + STD / (at.alpha**2 * STD**2 + at.sigma**2).sqrt() * (x - at.alpha * MEAN)
        errors.append((draw(config, objective).double() - exact).square().mean().sqrt().item())
    slope = math.log2(errors[0] / errors[2]) / 2
    assert slope == pytest.approx(2, abs=0.35), errors


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.type)
def test_ddim_without_noise_is_eulers_method(path):
    objective = objective_on(path)
    torch.testing.assert_close(
        draw(DDIMConfig(steps=10), objective), draw(EulerConfig(steps=10), objective), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.type)
def test_ancestral_sampling_is_ddim_at_eta_one(path):
    objective = objective_on(path)
    grid = EDMGridConfig(sigma_max=20.0)
    torch.testing.assert_close(
        draw(AncestralConfig(steps=10, grid=grid), objective),
        draw(DDIMConfig(steps=10, eta=1.0, grid=grid), objective),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("config", STOCHASTIC, ids=NAMES)
@pytest.mark.parametrize("path", [PATHS[0], PATHS[3]], ids=lambda path: path.type)
def test_samples_have_the_datas_moments(config, path):
    grid = EDMGridConfig(sigma_min=2e-3, sigma_max=20.0, rho=20.0)
    images = draw(config.model_copy(update={"steps": 80, "grid": grid}), objective_on(path), count=512).double()
    # standard errors of 8192 values: 1.1% of the mean's scale, .8% of the deviation
    assert images.mean().item() == pytest.approx(MEAN, abs=4 * STD / 8192**0.5)
    assert images.std().item() == pytest.approx(STD, rel=0.08)
    between = torch.corrcoef(images.flatten(1)[:, :4].T).fill_diagonal_(0)
    assert between.abs().max() < 0.2


class Probe:
    """Noise that is one at the purpose under study and zero elsewhere."""

    def __init__(self, only):
        self.only, self.seen = only, []

    def __call__(self, purpose):
        self.seen.append(purpose)
        return torch.full((1, 1), float(purpose == self.only), dtype=torch.float64)


def final_variance(solve, path, steps):
    """The variance that a linear solver leaves, exactly: squares of its response to each unit of noise, added up."""
    grid = EDMGridConfig(sigma_min=1e-3, sigma_max=20.0, rho=1000.0**0.5)
    knots = knots_at(path, solver_times(grid, path, steps, needs_signal=True))

    def predict(x, time):
        at = path.coefficients(time)
        data = at.alpha * STD**2 / (at.alpha**2 * STD**2 + at.sigma**2) * x
        return Endpoints(data, (x - at.alpha * data) / at.sigma)

    zero, unit = torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), knots.sigmas[0], dtype=torch.float64)
    listing = Probe(None)
    variance = solve(predict, knots, unit, listing).item() ** 2
    for purpose in listing.seen:
        variance += solve(predict, knots, zero, Probe(purpose)).item() ** 2
    return variance


SOLVERS = {
    "sde": solve_reverse_sde,
    "predictor_corrector": lambda *args: solve_reverse_sde(*args, corrector_steps=2, corrector_ratio=0.1),
    "ddim": lambda *args: solve_ddim(*args, eta=1.0),
    "ancestral": lambda *args: solve_ancestral(*args, forward_variance=False),
    "ancestral_forward": lambda *args: solve_ancestral(*args, forward_variance=True),
}


@pytest.mark.parametrize("name", ["sde", "ddim", "ancestral", "ancestral_forward"])
def test_stochastic_solvers_are_weakly_of_first_order(name):
    path = VPLinearConfig().load()(VPLinearConfig())
    errors = [final_variance(SOLVERS[name], path, steps) / STD**2 - 1 for steps in (50, 100, 200)]
    slope = math.log2(abs(errors[0] / errors[2])) / 2
    assert abs(errors[2]) < 0.1
    assert slope == pytest.approx(1.0, abs=0.3), errors


def test_corrections_mend_the_predictors_variance():
    path = VPLinearConfig().load()(VPLinearConfig())
    plain, corrected = (
        abs(final_variance(SOLVERS[name], path, 50) / STD**2 - 1) for name in ("sde", "predictor_corrector")
    )
    assert corrected < 0.8 * plain


@pytest.mark.parametrize("config", [*STOCHASTIC, DPMSolverConfig()], ids=[*NAMES, "dpm_solver"])
def test_a_sample_depends_on_its_number_alone(config):
    objective = objective_on(VPLinearConfig())
    config = config.model_copy(update={"steps": 5})
    assert torch.equal(draw(config, objective, count=8)[5:], draw(config, objective, count=3, start=5))


def test_new_noise_differs_from_step_to_step_and_from_the_start():
    purposes = Probe(None)
    path = VPLinearConfig().load()(VPLinearConfig())
    knots = knots_at(path, solver_times(UniformGridConfig(), path, 6, needs_signal=True))
    solve_reverse_sde(
        lambda x, time: Endpoints(0 * x, x), knots, torch.ones(1, 1), purposes, corrector_steps=2, corrector_ratio=0.1
    )
    assert len(set(purposes.seen)) == len(purposes.seen) == 5 * 3
    assert "noise" not in purposes.seen
