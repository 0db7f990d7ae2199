"""Solvers against the exact flow map, and guidance against its algebra."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from exact_denoisers import ExactDenoiser, Unconditional, finite_posterior, gaussian_posterior
from sixfold.distributed.randomness import PositionRandom
from sixfold.errors import RecipeError, UserError
from sixfold.objectives.denoising.config import DenoisingConfig
from sixfold.paths.config import EDMPathConfig, RectifiedFlowConfig, VEConfig, VPCosineConfig, VPLinearConfig
from sixfold.paths.predictions import convert
from sixfold.samplers.config import CFGConfig, EDMGridConfig, EulerConfig, HeunConfig, UniformGridConfig
from sixfold.samplers.contract import SampleRequest
from sixfold.samplers.flow import FlowSampler
from sixfold.samplers.grids import solver_times
from sixfold.samplers.guidance import classifier_free

MEAN, STD = 0.15, 0.12  # so that samples stay within [-1, 1], where images are clamped
PATHS = [
    RectifiedFlowConfig(),
    VPLinearConfig(),
    VPCosineConfig(),
    VEConfig(sigma_min=1e-4, sigma_max=20.0),
    EDMPathConfig(sigma_min=1e-4),
]
PREDICTIONS = ["velocity", "noise", "data", "v", "edm"]


def request(count=16, start=0, seed=5, **conditions):
    return SampleRequest(seed=seed, numbers=torch.arange(start, start + count), conditions=conditions)


def exact_samples(objective, config, count=16):
    """Carry the sampler's own starting noise to clean data by the exact flow map of Gaussian data."""
    path = objective.path.load()(objective.path)
    at = path.coefficients(
        solver_times(config.grid, path, config.steps, needs_signal=objective.prediction == "noise")[0]
    )
    x = at.sigma * PositionRandom(5, torch.arange(count)).normal("sampling/noise", (1, 4, 4)).double()
    variance = at.alpha**2 * STD**2 + at.sigma**2
    return MEAN + STD / variance.sqrt() * (x - at.alpha * MEAN)


def error_of(objective, config):
    network = ExactDenoiser(objective, gaussian_posterior(MEAN, STD))
    image = FlowSampler(config, objective, {"denoiser": Unconditional()})({"denoiser": network}, request())["image"]
    return (image.double() - exact_samples(objective, config)).square().mean().sqrt().item()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.type)
@pytest.mark.parametrize(("solver", "order"), [(EulerConfig, 1), (HeunConfig, 2)], ids=["euler", "heun"])
def test_solvers_converge_to_the_exact_flow_map_at_their_order(path, solver, order):
    objective = DenoisingConfig(path=path, prediction="velocity" if path.type == "rectified_flow" else "data")
    grid = UniformGridConfig() if path.type == "rectified_flow" else EDMGridConfig(sigma_min=1e-4, sigma_max=20.0)
    errors = [error_of(objective, solver(steps=steps, grid=grid)) for steps in (32, 64, 128)]
    slope = math.log2(errors[0] / errors[2]) / 2
    assert slope == pytest.approx(order, abs=0.25), errors


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.type)
def test_all_predictions_of_one_denoiser_sample_the_same(path):
    """Parametrisations are equivalent: only the last digits and, for noise, the starting time may differ."""
    config = HeunConfig(steps=12, grid=EDMGridConfig(sigma_max=20.0))
    images = []
    for prediction in PREDICTIONS:
        objective = DenoisingConfig(path=path, prediction=prediction)
        network = ExactDenoiser(objective, gaussian_posterior(MEAN, STD))
        images.append(
            FlowSampler(config, objective, {"denoiser": Unconditional()})({"denoiser": network}, request())["image"]
        )
    for other in images[1:]:
        torch.testing.assert_close(other, images[0], rtol=0, atol=2e-4)


def test_euler_on_a_variance_preserving_path_is_ddim():
    """x_s = alpha_s x0hat + sigma_s ehat (2010.02502, eq. 12 with eta = 0), step by step."""
    objective = DenoisingConfig(path=VPLinearConfig(), prediction="noise")
    config = EulerConfig(steps=10)
    network = ExactDenoiser(objective, gaussian_posterior(MEAN, STD))
    image = FlowSampler(config, objective, {"denoiser": Unconditional()})({"denoiser": network}, request())["image"]
    path = objective.path.load()(objective.path)
    times = [*solver_times(config.grid, path, 10, needs_signal=True).tolist(), 0.0]
    x = PositionRandom(5, torch.arange(16)).normal("sampling/noise", (1, 4, 4))
    x = x * path.coefficients(torch.tensor(times[0])).sigma
    for now, then in pairwise(times):
        time = torch.full((16,), now)
        at, after = path.coefficients(time), path.coefficients(torch.tensor(then))
        noise = network(x, time, {})
        data = (x - at.sigma[0] * noise) / at.alpha[0]
        x = after.alpha * data + after.sigma * noise
    torch.testing.assert_close(image, x, rtol=0, atol=1e-4)


def test_samples_of_a_finite_data_set_are_its_points():
    points = torch.tensor([-0.8, -0.1, 0.7]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2).contiguous()
    objective = DenoisingConfig()
    network = ExactDenoiser(objective, finite_posterior(points))
    sampler = FlowSampler(HeunConfig(steps=40), objective, {"denoiser": Unconditional(size=2)})
    image = sampler({"denoiser": network}, request(300))["image"]
    distance = torch.cdist(image.flatten(1), points.flatten(1))
    nearest = distance.min(1)
    assert nearest.values.quantile(0.95) < 0.02
    assert torch.bincount(nearest.indices, minlength=3).min() > 60


@pytest.mark.parametrize("config", [EulerConfig(steps=4), HeunConfig(steps=4)], ids=lambda config: config.type)
def test_a_sample_depends_on_its_number_alone(config):
    objective = DenoisingConfig()
    sampler = FlowSampler(config, objective, {"denoiser": Unconditional()})
    nets = {"denoiser": ExactDenoiser(objective, gaussian_posterior(MEAN, STD))}
    whole = sampler(nets, request(8))["image"]
    part = sampler(nets, request(3, start=5))["image"]
    assert torch.equal(whole[5:], part)
    assert not torch.equal(whole, sampler(nets, request(8, seed=6))["image"])


def test_heun_evaluates_twice_a_step_but_once_in_the_last_and_steps_can_be_overridden():
    objective = DenoisingConfig()
    network = ExactDenoiser(objective, gaussian_posterior(MEAN, STD))
    sampler = FlowSampler(HeunConfig(steps=40), objective, {"denoiser": Unconditional()})
    sampler({"denoiser": network}, SampleRequest(seed=0, numbers=torch.arange(2), conditions={}, steps=5))
    assert len(network.calls) == 9


class Conditional(nn.Module):
    """A velocity that depends on the label, with label 10 as null."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, time, condition):
        self.seen.append((time[0].item(), condition["label"].clone()))
        return (0.1 * condition["label"].float() + 1)[:, None, None, None] * x * (1 + time[:, None, None, None])


def guided_sample(guidance, steps=5, **conditions):
    network = Conditional()
    sampler = FlowSampler(
        EulerConfig(steps=steps, guidance=guidance),
        DenoisingConfig(),
        {"denoiser": Unconditional(null_values={"label": 10})},
    )
    return sampler({"denoiser": network}, request(4, **conditions))["image"], network.seen


def test_guidance_scales_one_and_zero_are_the_conditional_and_the_unconditional_prediction():
    label = torch.tensor([0, 1, 2, 3])
    conditional, seen = guided_sample(CFGConfig(scale=1.0), label=label)
    assert all(len(labels) == 4 for _, labels in seen)  # nothing is spent on the unconditional half
    unconditional, _ = guided_sample(CFGConfig(scale=1.0))
    zero, seen = guided_sample(CFGConfig(scale=0.0), label=label)
    torch.testing.assert_close(zero, unconditional)
    assert not torch.allclose(zero, conditional)
    assert all(torch.equal(labels, torch.tensor([10, 10, 10, 10, 0, 1, 2, 3])) for _, labels in seen)


def test_one_guided_step_is_u_plus_scale_times_c_minus_u():
    label = torch.tensor([0, 1, 2, 3])
    steps = {scale: guided_sample(CFGConfig(scale=scale), steps=1, label=label)[0] for scale in (0.0, 1.0, 0.9)}
    inside = (steps[0.0].abs() < 1) & (steps[1.0].abs() < 1) & (steps[0.9].abs() < 1)
    expected = steps[0.0] + 0.9 * (steps[1.0] - steps[0.0])
    assert inside.any()
    torch.testing.assert_close(steps[0.9][inside], expected[inside])


@pytest.mark.parametrize("target", ["noise", "data", "v", "edm", "score"])
def test_guidance_commutes_with_every_conversion(target):
    at = VPCosineConfig().load()(VPCosineConfig()).coefficients(torch.tensor([0.3, 0.8], dtype=torch.float64))
    x, u, c = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    guided_first = convert(classifier_free(u, c, 4.0), x, at, source="velocity", target=target)
    converted = [convert(value, x, at, source="velocity", target=target) for value in (u, c)]
    torch.testing.assert_close(guided_first, classifier_free(*converted, 4.0))


def test_guidance_keeps_to_its_interval():
    _, seen = guided_sample(CFGConfig(scale=3.0, low=0.3, high=0.7), steps=10, label=torch.zeros(4, dtype=torch.int64))
    assert {round(time, 1) for time, labels in seen if len(labels) == 8} == {0.3, 0.4, 0.5, 0.6, 0.7}


def test_guidance_without_conditions_and_unknown_conditions_are_refused():
    with pytest.raises(RecipeError, match="needs conditions"):
        FlowSampler(EulerConfig(guidance=CFGConfig()), DenoisingConfig(), {"denoiser": Unconditional()})
    sampler = FlowSampler(EulerConfig(), DenoisingConfig(), {"denoiser": Unconditional()})
    with pytest.raises(UserError, match="no condition label"):
        sampler({"denoiser": Conditional()}, request(2, label=torch.tensor([1, 2])))


def test_the_edm_grid_is_the_published_one():
    path = EDMPathConfig().load()(EDMPathConfig())
    times = solver_times(EDMGridConfig(), path, 18, needs_signal=False)
    index = torch.arange(18, dtype=torch.float64)
    expected = (80 ** (1 / 7) + index / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(times, expected)


def test_the_uniform_grid_shifts_like_training_times():
    path = RectifiedFlowConfig().load()(RectifiedFlowConfig())
    plain = solver_times(UniformGridConfig(), path, 10, needs_signal=False)
    torch.testing.assert_close(plain, torch.linspace(1.0, 0.1, 10, dtype=torch.float64))
    torch.testing.assert_close(
        solver_times(UniformGridConfig(shift=3.0), path, 10, needs_signal=False), 3 * plain / (1 + 2 * plain)
    )
