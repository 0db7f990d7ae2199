"""What few-step objectives come to, proved: exact flow maps, derivatives, limits and fixed points."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from exact_denoisers import ExactDenoiser, gaussian_posterior
from gaussian_flow import MEAN, SIZE, STD, Affine, Moments, build, exact, gaussian_batch, map_error, settings, train
from model_helpers import randomized
from sixfold.distributed.randomness import PositionRandom
from sixfold.models.dit.config import DiTConfig
from sixfold.objectives.contract import Batch, Phase
from sixfold.objectives.distillation.common import Drawn
from sixfold.objectives.distillation.consistency_config import (
    ConsistencyConfig,
    ContinuousPairsConfig,
    GridPairsConfig,
)
from sixfold.objectives.distillation.distribution_matching import matching_direction
from sixfold.objectives.distillation.distribution_matching_config import DistributionMatchingConfig
from sixfold.objectives.distillation.mean_flow_config import MeanFlowConfig
from sixfold.objectives.distillation.trigflow import trigonometric_velocity
from sixfold.objectives.distillation.trigflow_config import TrigFlowConsistencyConfig
from sixfold.paths.config import LogNormalTimeConfig, RectifiedFlowConfig, UniformTimeConfig

ALONE = {"teacher": None, "path": RectifiedFlowConfig(), "prediction": "velocity", "data_std": STD}
EVENLY = UniformTimeConfig(type="uniform")
AROUND_ONE = LogNormalTimeConfig(type="log_normal", mean=0.0, std=1.6)
MAIN = Phase(name="main", trains=("denoiser",))

WITHOUT_A_TEACHER = {
    # Neighbours share data and noise, of which the nearer shows more: a grid of N intervals errs by 1.2 / N.
    "iCT": ConsistencyConfig(pairs=GridPairsConfig(first_steps=128, last_steps=1024), weighting="inverse_gap", **ALONE),
    "ECT": ConsistencyConfig(
        pairs=ContinuousPairsConfig(stages=6, factor=4.0, time=EVENLY), weighting="inverse_gap", **ALONE
    ),
    "sCM": TrigFlowConsistencyConfig(time=AROUND_ONE, **ALONE),
    "MeanFlow": MeanFlowConfig(start="fresh", time=EVENLY, instantaneous_fraction=0.25, weight_power=0.0, **ALONE),
}


@pytest.mark.parametrize("name", WITHOUT_A_TEACHER)
def test_training_without_a_teacher_learns_the_flow_map(name):
    """From data alone, mean and standard deviation of the flow are found, and with them its map."""
    config = WITHOUT_A_TEACHER[name]
    assert map_error(config, Moments()) > 0.5
    student = train(build(config), {"denoiser": Moments()}, 150, lr=0.1, batch=2048)
    assert map_error(config, student) < 0.01


def test_continuous_consistency_distillation_learns_the_flow_map():
    config = TrigFlowConsistencyConfig(time=AROUND_ONE)
    nets = {"teacher": exact(), "denoiser": Moments()}
    student = train(build(config, settings()), nets, 100, lr=0.2, batch=128)
    assert map_error(config, student, settings()) < 0.01


def drawn_at(quantile, count=16):
    """Data, noise and no conditions in float64, all at one quantile of time."""
    batch = gaussian_batch(count)
    noise = torch.randn(count, 1, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    times = torch.full((count,), quantile, dtype=torch.float64)
    return Drawn(data=batch["image"].double(), noise=noise, quantile=times, condition={}, null={})


def flat_gradient(objective, nets, drawn):
    """Gradient of the loss of all samples with respect to the student, as one vector."""
    random = PositionRandom(1, torch.arange(len(drawn.data)))
    loss = objective.loss(nets, drawn, MAIN, random).loss.sum()
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(nets["denoiser"].parameters()))])


@pytest.mark.parametrize("time", [0.25, 0.5, 0.75])
def test_discrete_consistency_approaches_the_continuous_one(time):
    """N times the gradient of consistency distillation on N intervals tends to sCM's as 1 / N.

    With c so large that the tangent stays as it is but for 1 / c, both are 2 sum df/dtheta . df/dt but for factors of
    t alone: the discrete loss is a mean over d dimensions; sCM's network is F = (cos x - f) / (sd sin) and its tangent
    cos df/da, in units of sd, at the angle tan a = t / (sd (1 - t)).
    """
    offset, angle = 1e6, math.atan2(time, STD * (1 - time))
    nets = {"teacher": exact().double(), "denoiser": Affine().double()}
    drawn = drawn_at(time)
    continuous = build(TrigFlowConsistencyConfig(time=EVENLY, warmup_fraction=0.0, tangent_offset=offset), settings())
    angle_by_time = math.cos(angle) ** 2 / (STD * (1 - time) ** 2)
    factor = offset * STD**2 * math.tan(angle) * angle_by_time / drawn.data[0].numel()
    limit = factor * flat_gradient(continuous, nets, drawn)
    errors = []
    for count in (64, 128, 256, 512, 1024):
        pairs = GridPairsConfig(first_steps=count, last_steps=count)
        discrete = build(ConsistencyConfig(pairs=pairs, solver="heun"), settings())
        interval = drawn_at(time - 0.5 / count)  # whose noisier end is at the time
        errors.append(((count * flat_gradient(discrete, nets, interval) - limit).norm() / limit.norm()).item())
    slopes = [math.log2(before / after) for before, after in pairwise(errors)]
    assert errors[-1] < 0.01
    assert all(slope == pytest.approx(1.0, abs=0.1) for slope in slopes), (errors, slopes)


@pytest.mark.parametrize("faded_in", [0.3, 1.0])
def test_tangent_of_a_transformer_is_that_of_finite_differences(faded_in):
    """g / (|g| + c) with g = -cos^2 (F - dx/da) - r cos sin (x + dF/da), of a real DiT, in float64 to 1e-6."""
    config = TrigFlowConsistencyConfig(warmup_fraction=0.5, tangent_offset=0.1)
    objective = build(config, settings())
    small = DiTConfig(image_size=SIZE, patch_size=1, channels=1, width=16, depth=2, heads=2, time_scale=8.0)
    network = randomized(small, seed=3)
    network = network.double().requires_grad_(False)
    drawn = drawn_at(0.5, count=8)
    angle = torch.linspace(0.1, 1.45, 8, dtype=torch.float64)
    cos, sin = (part.reshape(-1, 1, 1, 1) for part in (torch.cos(angle), torch.sin(angle)))
    x = cos * drawn.data + STD * sin * drawn.noise

    def velocity(x, angle):
        return trigonometric_velocity(objective.student, network, x, angle, {})

    driven = trigonometric_velocity(objective.teacher, exact().double(), x, angle, {})
    found = objective._tangent(velocity, x, angle, driven, faded_in * config.warmup_fraction)

    h = 1e-5
    ahead, behind = (velocity(x + step * STD * driven, angle + step) for step in (h, -h))
    change = (ahead - behind) / (2 * h)
    expected = -cos * cos * (velocity(x, angle) - driven) - faded_in * cos * sin * (x / STD + change)
    assert change.abs().max() > 0.1
    expected = expected / (expected.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) + config.tangent_offset)
    assert (found - expected).abs().max() < 1e-6


class Gaussian(nn.Module):
    """A one-step student that draws from N(mean, std^2): at t = 1 the data it implies are mean + std e."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (mean, std))

    def forward(self, x, time, condition):
        return x - (self.mean + self.std * x)


SHIFTS = (-0.2, -1e-3, 0.0, 1e-3, 0.2)
STRETCHES = (0.8, 0.999, 1.0, 1.001, 1.25)


def test_distribution_matching_is_at_rest_at_matching_moments_and_only_there():
    """Each moment that is off gets a gradient that leads back; none gets one where both fit, not even by sample."""
    objective = build(DistributionMatchingConfig(), settings())
    batch = gaussian_batch(1024)
    wide = Batch({"image": batch["image"].double()}, batch.positions)
    for shift in SHIFTS:
        for stretch in STRETCHES:
            student = Gaussian(MEAN + shift, STD * stretch)
            fake = ExactDenoiser(settings(), gaussian_posterior(MEAN + shift, STD * stretch)).double()
            nets = {"denoiser": student, "teacher": exact().double(), "fake_score": fake}
            terms = objective(nets, wide, MAIN, PositionRandom(5, batch.positions))
            pulls = torch.autograd.grad(terms.loss / terms.count, [student.mean, student.std])
            direction = terms.metrics["direction"].total.item()
            if shift == 0.0 and stretch == 1.0:
                assert direction == 0.0
                assert all(pull == 0.0 for pull in pulls)
                continue
            assert direction > 1e-4
            # Beliefs about one sample do not tell the moments apart: the smaller fault may be pulled by the larger.
            pull, off = max(zip(pulls, (shift, stretch - 1.0), strict=True), key=lambda pair: abs(pair[1]))
            assert pull * off > 0, (shift, stretch)


def test_the_direction_is_between_beliefs_over_their_distance_from_the_sample():
    samples, real, fake = (
        torch.randn(5, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (1, 2, 3)
    )
    size = (samples - real).abs().flatten(1).mean(1).reshape(-1, 1, 1, 1)
    expected = ((samples - real) - (samples - fake)) / size
    torch.testing.assert_close(matching_direction(samples, real=real, fake=fake), expected)
