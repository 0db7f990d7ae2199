"""Paths, time distributions and weightings against their published formulas."""

import math

import pytest
import torch

from sixfold.paths.config import (
    EDMPathConfig,
    EDMWeightingConfig,
    LogitNormalTimeConfig,
    LogNormalTimeConfig,
    MinSNRWeightingConfig,
    ModeTimeConfig,
    RectifiedFlowConfig,
    UniformTimeConfig,
    VEConfig,
    VPCosineConfig,
    VPLinearConfig,
)
from sixfold.paths.predictions import Endpoints, express, network_input
from sixfold.paths.times import time_at_quantile
from sixfold.paths.weightings import loss_weight

PATHS = [RectifiedFlowConfig(), VPLinearConfig(), VPCosineConfig(), VEConfig(), EDMPathConfig()]
QUANTILES = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000


def build(config):
    return config.load()(config)


def inner_times(path, count=41):
    fraction = torch.linspace(0.01, 0.99, count, dtype=torch.float64)
    return path.time_data + (path.time_noise - path.time_data) * fraction


@pytest.mark.parametrize("config", PATHS, ids=lambda config: config.type)
def test_rates_are_the_derivatives(config):
    path = build(config)
    time = inner_times(path).requires_grad_()
    at = path.coefficients(time)
    (alpha_rate,) = torch.autograd.grad(at.alpha.sum() + 0.0 * time.sum(), time, retain_graph=True)
    (sigma_rate,) = torch.autograd.grad(at.sigma.sum(), time)
    torch.testing.assert_close(at.alpha_rate, alpha_rate)
    torch.testing.assert_close(at.sigma_rate, sigma_rate)


@pytest.mark.parametrize("config", PATHS, ids=lambda config: config.type)
def test_time_at_inverts_the_noise_to_signal_ratio(config):
    path = build(config)
    time = inner_times(path)
    at = path.coefficients(time)
    torch.testing.assert_close(path.time_at(3.0 * at.alpha, 3.0 * at.sigma), time)


@pytest.mark.parametrize("config", PATHS, ids=lambda config: config.type)
def test_the_ends_of_the_interval_survive_inversion_and_shift(config):
    path = build(config)
    ends = torch.tensor([path.time_data, path.time_noise], dtype=torch.float64)
    at = path.coefficients(ends)
    torch.testing.assert_close(path.time_at(at.alpha, at.sigma), ends)
    assert path.shift(ends, 3.0).isfinite().all()


def test_the_linear_variance_preserving_path_is_ddpms_schedule():
    """1000 steps of beta from 1e-4 to 0.02 (2006.11239, section 4) approach the continuous path as the steps shrink."""
    path = build(VPLinearConfig())
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    signal = torch.cumprod(1.0 - betas, 0).sqrt()
    time = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    assert (path.coefficients(time).alpha - signal).abs().max() < 2e-3


def test_the_cosine_path_is_the_published_one():
    def squared_cosine(time):
        return torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    time = torch.linspace(0, 1, 101, dtype=torch.float64)
    at = build(VPCosineConfig()).coefficients(time)
    torch.testing.assert_close(at.alpha**2, squared_cosine(time) / squared_cosine(torch.zeros_like(time)))
    torch.testing.assert_close(at.alpha**2 + at.sigma**2, torch.ones_like(time))


def test_the_shift_of_the_rectified_path_is_stable_diffusion_3s():
    time = torch.linspace(0, 1, 33, dtype=torch.float64)
    shifted = build(RectifiedFlowConfig()).shift(time, 3.0)
    torch.testing.assert_close(shifted, 3.0 * time / (1.0 + 2.0 * time))


def test_edm_preconditioning_is_the_published_one():
    """c_skip, c_out, c_in, c_noise of 2206.00364, table 1."""
    sd, path = 0.5, build(EDMPathConfig())
    sigma = torch.tensor([0.01, 0.3, 2.0, 40.0], dtype=torch.float64)
    at = path.coefficients(sigma)
    data, noise = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wide = sigma[:, None]
    x = data + wide * noise
    c_skip, c_out = sd**2 / (wide**2 + sd**2), wide * sd / torch.sqrt(wide**2 + sd**2)
    torch.testing.assert_close(express(Endpoints(data, noise), "edm", at, sd), (data - c_skip * x) / c_out)
    seen, seen_time = network_input(x, sigma, at, "edm", sd)
    torch.testing.assert_close(seen, x / torch.sqrt(wide**2 + sd**2))
    torch.testing.assert_close(seen_time, torch.log(sigma) / 4)
    torch.testing.assert_close(loss_weight(EDMWeightingConfig(), "edm", at, sd), torch.ones_like(sigma))
    published = (sigma**2 + sd**2) / (sigma * sd) ** 2
    torch.testing.assert_close(loss_weight(EDMWeightingConfig(), "data", at, sd), published)


def test_min_snr_weights_are_the_published_ones():
    at = build(VPCosineConfig()).coefficients(torch.linspace(0.01, 0.99, 50, dtype=torch.float64))
    snr = (at.alpha / at.sigma) ** 2
    clipped = snr.clamp(max=5.0)
    config = MinSNRWeightingConfig()
    torch.testing.assert_close(loss_weight(config, "noise", at, 0.5), clipped / snr)
    torch.testing.assert_close(loss_weight(config, "data", at, 0.5), clipped)
    torch.testing.assert_close(loss_weight(config, "v", at, 0.5), clipped / (snr + 1.0))


TIMES = [UniformTimeConfig(), LogitNormalTimeConfig(mean=0.3, std=0.8), ModeTimeConfig(), LogNormalTimeConfig()]


@pytest.mark.parametrize("config", PATHS, ids=lambda config: config.type)
@pytest.mark.parametrize("time", TIMES, ids=lambda config: config.type)
def test_quantile_maps_are_monotone_and_stay_on_the_path(config, time):
    path = build(config)
    mapped = time_at_quantile(time, path, QUANTILES)
    assert (mapped.diff() >= 0).all()
    assert mapped.min() >= path.time_data
    assert mapped.max() <= path.time_noise


def test_logit_normal_and_log_normal_times_have_their_moments():
    path = build(RectifiedFlowConfig())
    logit = torch.logit(time_at_quantile(LogitNormalTimeConfig(mean=0.3, std=0.8), path, QUANTILES))
    assert abs(logit.mean() - 0.3) < 1e-3
    assert abs(logit.std() - 0.8) < 1e-2
    log_sigma = time_at_quantile(LogNormalTimeConfig(), build(EDMPathConfig()), QUANTILES).log()
    assert abs(log_sigma.mean() + 1.2) < 1e-2
    assert abs(log_sigma.std() - 1.2) < 1e-2


def test_on_the_rectified_path_logit_normal_is_log_normal_and_shift_moves_its_mean():
    """t/(1-t) is the noise-to-signal ratio, so that both distributions are one and shift a adds ln a to the mean."""
    path = build(RectifiedFlowConfig())
    shifted = time_at_quantile(LogitNormalTimeConfig(mean=0.3, std=0.8, shift=3.0), path, QUANTILES)
    moved = LogNormalTimeConfig(mean=0.3 + math.log(3.0), std=0.8)
    torch.testing.assert_close(shifted, time_at_quantile(moved, path, QUANTILES))


def test_mode_times_follow_stable_diffusion_3():
    """f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u) at u and quantile 1 - u: theirs falls, ours rises."""
    scale = 1.29
    u = QUANTILES
    theirs = 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    ours = time_at_quantile(ModeTimeConfig(scale=scale), build(RectifiedFlowConfig()), 1 - u)
    torch.testing.assert_close(ours, theirs)
