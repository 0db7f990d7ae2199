"""Distillation against closed forms on Gaussian data N(mean, std^2), for which every flow map is known."""

import math

import pytest
import torch
from torch import nn

from exact_denoisers import ExactDenoiser, gaussian_posterior
from gaussian_flow import (
    MEAN,
    SIZE,
    STD,
    Affine,
    build,
    exact,
    exact_map,
    gaussian_batch,
    images_of,
    map_error,
    networks,
    settings,
    train,
)
from sixfold.distributed.randomness import PositionRandom
from sixfold.errors import RecipeError
from sixfold.objectives.contract import Batch, Phase, Progress
from sixfold.objectives.distillation.consistency import grid_steps, pair_at
from sixfold.objectives.distillation.consistency_config import (
    ConsistencyConfig,
    ContinuousPairsConfig,
    GridPairsConfig,
)
from sixfold.objectives.distillation.derivatives import directional_derivative
from sixfold.objectives.distillation.distribution_matching_config import DistributionMatchingConfig
from sixfold.objectives.distillation.mean_flow_config import MeanFlowConfig
from sixfold.objectives.distillation.trajectory import implied_data
from sixfold.objectives.distillation.trajectory_config import ProgressiveConfig, ReflowConfig
from sixfold.objectives.distillation.trigflow import consistency_tangent, trigonometric_velocity
from sixfold.objectives.distillation.trigflow_config import TrigFlowConsistencyConfig
from sixfold.objectives.distillation.view import View, on_path
from sixfold.paths.config import (
    EDMPathConfig,
    RectifiedFlowConfig,
    UniformTimeConfig,
    VPCosineConfig,
    VPLinearConfig,
)
from sixfold.paths.predictions import Endpoints

PATHS = [RectifiedFlowConfig(), VPLinearConfig(), VPCosineConfig(), EDMPathConfig()]
PREDICTIONS = ["velocity", "noise", "v", "edm"]


class Function(nn.Module):
    """A network that is a plain function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.type)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_any_network_answers_on_any_path(path, prediction):
    """A teacher of each path and prediction, asked on a rectified, a trigonometric and EDM's path, is always right."""
    trained_for = settings(path, prediction)
    view, network = View.of(trained_for), exact(trained_for).double()
    x0, e = (
        torch.randn(5, 1, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (1, 2)
    )
    time = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    asked = [(1 - time, time), (torch.cos(time), torch.sin(time)), (torch.ones_like(time), 3 * time)]
    for alpha, sigma in asked:
        x = on_path(Endpoints(x0, e), alpha, sigma)
        ends = view(network, x, alpha, sigma, {})
        wide = [value[:, None, None, None] for value in (alpha, sigma)]
        expected = gaussian_posterior(MEAN, STD)(x, *wide)
        torch.testing.assert_close(ends.data, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(on_path(ends, alpha, sigma), x, rtol=1e-6, atol=1e-6)


def test_consistency_distillation_learns_the_flow_map():
    config = ConsistencyConfig(pairs=GridPairsConfig(first_steps=20, last_steps=20))
    student = train(build(config, settings()), {"teacher": exact(), "denoiser": Affine()}, 400, lr=2e-2)
    assert map_error(config, student, settings()) < 0.01


def test_mean_flow_learns_the_flow_map():
    config = MeanFlowConfig(
        teacher="teacher",
        start="fresh",
        time=UniformTimeConfig(type="uniform"),
        instantaneous_fraction=0.25,
        weight_power=0.0,
    )
    student = train(build(config, settings()), {"teacher": exact(), "denoiser": Affine(2)}, 900, lr=4e-2, batch=64)
    assert map_error(config, student, settings()) < 0.01
    assert map_error(config, student, settings(), steps=2) < 0.01


class ExactMeanFlow(nn.Module):
    """u(x, r, t) = (x_t - x_r) / (t - r) of the exact flow."""

    def forward(self, x, time, condition):
        stop = time - condition["interval"]
        reached = exact_map(x, (1 - time, time), (1 - stop, stop))
        return (x - reached) / (time - stop).reshape(-1, 1, 1, 1)


def test_the_exact_mean_velocity_is_a_fixed_point():
    """The mean flow identity u = v - (t - r) du/dt holds for the exact flow map: nothing is left to learn."""
    config = MeanFlowConfig(teacher="teacher", start="fresh", instantaneous_fraction=0.0, weight_power=0.0)
    objective = build(config, settings())
    batch = gaussian_batch(64)
    wide = Batch({"image": batch["image"].double()}, batch.positions)
    nets = {"teacher": exact().double(), "denoiser": ExactMeanFlow()}
    terms = objective(nets, wide, Phase(name="main", trains=("denoiser",)), PositionRandom(1, batch.positions))
    assert terms.loss / terms.count < 1e-8
    biased = {**nets, "denoiser": Function(lambda *inputs: ExactMeanFlow()(*inputs) + 0.1)}
    off = objective(biased, wide, Phase(name="main", trains=("denoiser",)), PositionRandom(1, batch.positions))
    assert off.loss / off.count > 1e-3


def student_velocity(x, time, condition):
    """Some smooth student."""
    return torch.sin(1.3 * x + time[:, None, None, None]) - 0.4 * x**2


def test_tangent_is_the_rate_of_the_consistency_function():
    """cos(t) df/dt along the teacher's trajectory is what central differences and the discrete loss come to."""
    trained_for = settings()
    view, teacher = View.of(trained_for), exact().double()
    x0, e = (
        torch.randn(8, 1, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (1, 2)
    )
    angle = torch.linspace(0.2, 1.3, 8, dtype=torch.float64)
    wide = angle.reshape(-1, 1, 1, 1)

    def position(angle):
        return torch.cos(angle), STD * torch.sin(angle)

    def consistency(x, angle):
        return view(student_velocity, x, *position(angle), {}).data

    def velocity(x, angle):
        return trigonometric_velocity(view, student_velocity, x, angle, {})

    x = on_path(Endpoints(x0, e), *position(angle))
    driven = trigonometric_velocity(view, teacher, x, angle, {})
    along = (torch.cos(wide) * torch.sin(wide) * STD * driven, torch.cos(angle) * torch.sin(angle))
    held, change = directional_derivative(velocity, (x, angle), along)
    tangent = STD * consistency_tangent(
        cos=torch.cos(wide), sin=torch.sin(wide), x=x / STD, held=held, driven=driven, change=change, faded_in=1.0
    )
    h = 1e-5
    steps = [exact_map(x, position(angle), position(angle + s * h)) for s in (-1, 1)]
    before, after = (consistency(part, angle + s * h) for part, s in zip(steps, (-1, 1), strict=True))
    rate = torch.cos(wide) * (after - before) / (2 * h)
    assert (tangent - rate).abs().max() < 1e-6
    discrete = torch.cos(wide) * (consistency(x, angle) - before) / h
    assert (discrete - tangent).abs().max() < 1e-3


def test_the_exact_consistency_function_has_no_tangent():
    config = TrigFlowConsistencyConfig(warmup_fraction=0.0)
    objective = build(config, settings())

    def perfect(x, time, condition):
        """The velocity whose implied data are the end of the exact trajectory."""
        one, none = torch.ones_like(time), torch.zeros_like(time)
        return (x - exact_map(x, (1 - time, time), (one, none))) / time.reshape(-1, 1, 1, 1)

    batch = gaussian_batch(64)
    wide = Batch({"image": batch["image"].double()}, batch.positions)
    phase = Phase(name="main", trains=("denoiser",), done=0.5)
    nets = {"teacher": exact().double(), "denoiser": Function(perfect)}
    assert objective(nets, wide, phase, PositionRandom(1, batch.positions)).loss / 64 < 1e-8
    nets["denoiser"] = Function(student_velocity)
    assert objective(nets, wide, phase, PositionRandom(1, batch.positions)).loss / 64 > 0.1


@pytest.mark.parametrize("shift", [0.0, 0.2])
@pytest.mark.parametrize("stretch", [1.0, 1.3])
def test_matching_moments_leave_no_gradient(shift, stretch):
    """DMD on Gaussians: mean and scale of the student get a gradient if and only if they differ from the data's."""
    config = DistributionMatchingConfig()
    objective = build(config, settings())
    mean = torch.tensor(MEAN + shift, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(STD * stretch, dtype=torch.float64, requires_grad=True)

    def student(x, time, condition):
        return x - (mean + scale * x)  # at t = 1 the data it implies are mean + scale e

    fake = ExactDenoiser(settings(), gaussian_posterior(MEAN + shift, STD * stretch)).double()
    batch = gaussian_batch(4096)
    wide = Batch({"image": batch["image"].double()}, batch.positions)
    nets = {"denoiser": Function(student), "teacher": exact().double(), "fake_score": fake}
    terms = objective(nets, wide, Phase(name="main", trains=("denoiser",)), PositionRandom(5, batch.positions))
    gradients = torch.autograd.grad(terms.loss / terms.count, [mean, scale])
    if shift == 0.0 and stretch == 1.0:
        assert all(gradient.abs() < 1e-12 for gradient in gradients)
    if shift > 0.0:
        assert gradients[0] > 0.05  # downhill is back towards the data's mean
    if stretch > 1.0:
        assert gradients[1] > 0.05


def test_students_step_less_often_than_the_fake_score():
    objective = build(DistributionMatchingConfig(fake_updates=5), settings())
    plans = [objective.phases(Progress(samples=0, step=step, total_steps=20)) for step in range(20)]
    assert [len(plan) for plan in plans] == [1, 1, 1, 1, 2] * 4
    assert all(plan[0].trains == ("fake_score",) for plan in plans)
    assert plans[4][1].trains == ("denoiser",)


def test_pairs_come_nearer():
    path = View.of(settings()).path
    quantile = torch.linspace(0.01, 0.99, 99)
    grid = GridPairsConfig(first_steps=10, last_steps=80)
    assert [grid_steps(grid, done) for done in (0.0, 0.26, 0.51, 0.76, 0.99)] == [10, 20, 40, 80, 80]
    pair = pair_at(grid, path, quantile, 0.0)
    torch.testing.assert_close(pair.noisy - pair.clean, torch.full((99,), 0.1))
    assert pair.noisy.max() == 1.0
    gaps = []
    for done in (0.0, 0.5, 0.99):
        pair = pair_at(ContinuousPairsConfig(stages=4), path, quantile, done)
        assert (pair.noisy > pair.clean).all()
        assert (pair.clean >= 0).all()
        gaps.append((pair.noisy - pair.clean).mean().item())
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] / 2
    # ECT's first stage keeps half of large ratios and none of small ones
    ratio = 0.5 * (1 + 8 * torch.sigmoid(torch.tensor(-2.0)))
    edm = View.of(settings(EDMPathConfig(), "edm")).path
    noisy, clean = pair_at(ContinuousPairsConfig(), edm, torch.special.ndtr((torch.tensor([2.0]).log() + 1.1) / 2), 0.0)
    torch.testing.assert_close(clean, (noisy - noisy * ratio).clamp(min=edm.time_data))


def test_one_step_of_progressive_distillation_equals_two():
    """A student that implies the target data takes in one step exactly what the teacher takes in two."""
    x, end = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2)
    start, stop = (torch.full((4,), 0.4), torch.full((4,), 0.6)), (torch.full((4,), 0.6), torch.full((4,), 0.4))
    data = implied_data(x, end, start=start, stop=stop)
    noise = (x - 0.4 * data) / 0.6
    torch.testing.assert_close(0.6 * data + 0.4 * noise, end)


@pytest.mark.parametrize("config", [ProgressiveConfig(student_steps=4), ReflowConfig(solver_steps=4)])
def test_trajectories_train_any_student(config):
    objective, batch = build(config, settings(VPCosineConfig(), "v")), gaussian_batch(32)
    nets = {"teacher": exact(settings(VPCosineConfig(), "v")), "denoiser": Affine()}
    terms = objective(nets, batch, Phase(name="main", trains=("denoiser",)), PositionRandom(1, batch.positions))
    torch.autograd.backward(terms.loss)
    assert math.isfinite(terms.loss.item())
    assert all(parameter.grad is not None for parameter in nets["denoiser"].parameters())


def test_students_that_cannot_be_are_refused():
    with pytest.raises(RecipeError, match="boundary condition"):
        build(ConsistencyConfig(), settings(VPLinearConfig(), "noise"))
    with pytest.raises(RecipeError, match="straight paths"):
        build(MeanFlowConfig(teacher="teacher"), settings(VPLinearConfig(), "v"))
    with pytest.raises(RecipeError, match="compares with a teacher"):
        build(DistributionMatchingConfig(teacher=None))
    with pytest.raises(RecipeError, match="to be a trained denoiser"):
        build(ConsistencyConfig())
    with pytest.raises(RecipeError, match="another path or prediction"):
        build(ConsistencyConfig(prediction="v"), settings())
    larger = {**networks(settings()), "denoiser": images_of(2 * SIZE)}
    config = ConsistencyConfig()
    with pytest.raises(RecipeError, match="cannot teach this student"):
        config.load()(config, larger)
