"""The samplers' steps against the public schedulers, with the same model and the same noise."""

import pytest
import torch

from sixfold.paths.config import EDMPathConfig, VPDiscreteConfig
from sixfold.paths.predictions import endpoints_of
from sixfold.samplers.denoising import Knots, knots_at
from sixfold.samplers.dpm_solver import solve_dpm_2m
from sixfold.samplers.flow import solve
from sixfold.samplers.stochastic import solve_ancestral, solve_ddim

diffusers = pytest.importorskip("diffusers")

STEPS = 20
START = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TRAINED = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
PATH = VPDiscreteConfig().load()(VPDiscreteConfig())
EDM = EDMPathConfig(sigma_min=1e-4, sigma_max=1e4).load()(EDMPathConfig(sigma_min=1e-4, sigma_max=1e4))


def model(x, level):
    """A smooth nonlinear function of x and the noise level, standing in for a network's predicted noise."""
    level = torch.as_tensor(level, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x * (1.0 + 0.3 * level)) + 0.1 * torch.sin(3 * x) * level


def noise(purpose):
    step = int(purpose.rpartition("/")[2])
    return torch.randn(START.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + step))


def by_step(x, time):
    """Predictions on the variance-preserving path; step k of the table is time (k + 1) / 1000."""
    return endpoints_of(model(x, time * 1000 / 1000), "noise", x, PATH.coefficients(time), 0.5)


def by_sigma(x, sigma):
    """The same network used on the variance-exploding path: it sees x / sqrt(1 + sigma^2)."""
    wide = sigma.reshape(-1, 1, 1, 1)
    value = model(x / torch.sqrt(1 + wide**2), torch.log1p(sigma) / 5)
    return endpoints_of(value, "noise", x, EDM.coefficients(sigma), 0.5)


def knots_of(timesteps):
    return knots_at(PATH, (timesteps.double() + 1) / 1000)


def drive(scheduler, step, x=START):
    for index, timestep in enumerate(scheduler.timesteps):
        x = step(scheduler, index, timestep, x)
    return x


def largest_difference(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def _predicted(timestep, x):
    return model(x, torch.full((len(x),), (float(timestep) + 1) / 1000, dtype=x.dtype))


def ending_in_clean_data(scheduler):
    """The last step goes to their step -1, which ``set_alpha_to_one`` makes clean data."""
    scheduler.set_timesteps(STEPS)
    return scheduler


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim(eta):
    scheduler = ending_in_clean_data(diffusers.DDIMScheduler(**TRAINED, clip_sample=False, set_alpha_to_one=True))

    def step(scheduler, index, timestep, x):
        new = noise(f"step/{index}")
        return scheduler.step(_predicted(timestep, x), timestep, x, eta=eta, variance_noise=new).prev_sample

    theirs = drive(scheduler, step)
    ours = solve_ddim(by_step, knots_of(scheduler.timesteps), START, noise, eta=eta)
    assert largest_difference(ours, theirs) < 1e-5


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm(variance, monkeypatch):
    scheduler = diffusers.DDPMScheduler(**TRAINED, clip_sample=False, variance_type=variance)
    scheduler.set_timesteps(STEPS)
    current = []
    module = __import__("diffusers.schedulers.scheduling_ddpm", fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **kwargs: noise(f"step/{current[-1]}"))

    def step(scheduler, index, timestep, x):
        current.append(index)
        return scheduler.step(_predicted(timestep, x), timestep, x).prev_sample

    theirs = drive(scheduler, step)
    ours = solve_ancestral(
        by_step, knots_of(scheduler.timesteps), START, noise, forward_variance=variance == "fixed_large"
    )
    assert largest_difference(ours, theirs) < 1e-5


@pytest.mark.parametrize("second_order", [False, True], ids=["euler", "heun"])
def test_euler_and_heun(second_order):
    kind = diffusers.HeunDiscreteScheduler if second_order else diffusers.EulerDiscreteScheduler
    scheduler = kind(**TRAINED)
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.double()
    levels = sigmas.unique_consecutive()
    calls = []

    def step(scheduler, index, timestep, x):
        scheduler._step_index = scheduler._step_index if scheduler._step_index is not None else 0
        sigma = sigmas[scheduler._step_index].item()
        calls.append(sigma)
        seen = scheduler.scale_model_input(x, timestep)
        level = torch.full((len(x),), sigma, dtype=x.dtype).log1p() / 5
        return scheduler.step(model(seen, level), timestep, x).prev_sample

    start = START * levels[0]
    theirs = drive(scheduler, step, start)
    knots = Knots(levels[:-1].tolist(), [1.0] * len(levels), levels.tolist())
    ours = solve(by_sigma, knots, start, second_order=second_order)
    assert len(levels) == STEPS + 1
    assert len(calls) == (2 * STEPS - 1 if second_order else STEPS)
    assert largest_difference(ours, theirs) < 1e-5


def test_dpm_solver_plus_plus():
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **TRAINED, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(STEPS)

    def step(scheduler, index, timestep, x):
        return scheduler.step(_predicted(timestep, x), timestep, x).prev_sample

    theirs = drive(scheduler, step)
    ours = solve_dpm_2m(by_step, knots_of(scheduler.timesteps), START)
    assert largest_difference(ours, theirs) < 1e-5
