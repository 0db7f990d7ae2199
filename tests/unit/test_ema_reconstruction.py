"""Power-function averages: their profile, their closed form on a known trajectory, and any of them from two others."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from sixfold.engine.averaging import MAIN, MovingAverages, decays, exponent_of, kinds_of, width_of
from sixfold.engine.averaging_config import ConstantAverageConfig, PowerAverageConfig
from sixfold.engine.posthoc import Profile, _inner_products, reconstruct

POWER = PowerAverageConfig(widths=(0.05, 0.10))


def averages_of(trajectory, config):
    """Every average after every update, as float64 arrays by kind."""
    parameter = torch.zeros(1, dtype=torch.float64)
    averages = MovingAverages(config, {"p": parameter})
    history = {kind: [] for kind in averages.values}
    for update, value in enumerate(trajectory, 1):
        parameter.fill_(value)
        averages.update(update, {"p": parameter})
        for kind, values in averages.values.items():
            history[kind].append(values["p"].item())
    return {kind: np.array(values) for kind, values in history.items()}


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25])
def test_the_exponent_has_the_width(width):
    exponent = exponent_of(width)
    assert width_of(exponent) == pytest.approx(width, rel=1e-12)

    def moment(order):
        return quad(lambda x: x**order * (exponent + 1) * x**exponent, 0, 1, epsabs=1e-13)[0]

    assert math.sqrt(moment(2) - moment(1) ** 2) == pytest.approx(width, rel=1e-6)


def test_published_exponents():
    """EDM2, section 3.1: widths of 5% and 10% are exponents 16.97 and 6.94."""
    assert exponent_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent_of(0.10) == pytest.approx(6.94, abs=0.005)


def test_an_average_is_the_integral_of_the_trajectory_against_its_profile():
    trajectory = np.sin(np.arange(1, 61) / 7) + np.arange(1, 61) / 30
    found = averages_of(trajectory, POWER)
    for kind, width in zip(kinds_of(POWER), POWER.widths, strict=True):
        exponent = exponent_of(width)
        for updates in (1, 2, 17, 60):
            ends = np.arange(updates + 1) / updates
            expected = (np.diff(ends ** (exponent + 1)) * trajectory[:updates]).sum()
            assert found[kind][updates - 1] == pytest.approx(expected, rel=1e-12)


def test_of_a_trajectory_that_grows_steadily_it_is_the_closed_form():
    """Of theta(k) = k the average tends to t (g + 1) / (g + 2) + 1/2."""
    found = averages_of(np.arange(1.0, 4001.0), POWER)
    for kind, width in zip(kinds_of(POWER), POWER.widths, strict=True):
        exponent = exponent_of(width)
        assert found[kind][-1] == pytest.approx(4000 * (exponent + 1) / (exponent + 2) + 0.5, rel=1e-6)


def test_inner_products_are_the_integrals():
    profiles = [Profile(updates=updates, width=width) for updates in (40, 100) for width in (0.05, 0.2)]

    def profile(which, x):
        exponent = exponent_of(which.width)
        return (exponent + 1) * x**exponent / which.updates ** (exponent + 1) * (x <= which.updates)

    found = _inner_products(profiles, profiles)
    for i, first in enumerate(profiles):
        for j, second in enumerate(profiles):
            shared = min(first.updates, second.updates)
            exact = quad(lambda x, a=first, b=second: profile(a, x) * profile(b, x), 0, shared)[0]
            assert float(found[i, j]) == pytest.approx(exact, rel=1e-7)


def test_a_kept_profile_is_reconstructed_exactly():
    kept = [Profile(updates=updates, width=width) for updates in (100, 200, 300) for width in POWER.widths]
    for index in (1, 5):
        found = reconstruct(kept, kept[index])
        assert found.error < 1e-6
        torch.testing.assert_close(found.weights, torch.eye(6, dtype=torch.float64)[index], rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [0.03, 0.07, 0.15, 0.2])
def test_an_average_that_nobody_kept_is_reconstructed(length):
    """Twenty snapshots of two averages of a smooth and noisy trajectory, against the average itself."""
    updates = 800
    noise = np.random.default_rng(0).normal(size=updates)
    trajectory = np.cos(np.arange(updates) / 90) + np.exp(-np.arange(updates) / 60) + 0.05 * noise
    kept = averages_of(trajectory, POWER)
    steps = range(40, updates + 1, 40)
    profiles = [Profile(updates=step, width=width) for step in steps for width in POWER.widths]
    values = torch.tensor([kept[kind][step - 1] for step in steps for kind in kinds_of(POWER)], dtype=torch.float64)
    found = reconstruct(profiles, Profile(updates=updates, width=length))
    exact = averages_of(trajectory, PowerAverageConfig(widths=(length,)))[MAIN][-1]
    assert found.error < 0.05
    assert float(found.weights.sum()) == pytest.approx(1.0, abs=0.02)
    assert float(found.weights @ values) == pytest.approx(exact, abs=2e-3)
    nearest = min(abs(kept[kind][-1] - exact) for kind in kept)
    assert abs(float(found.weights @ values) - exact) < 0.2 * nearest, "it must beat what is kept"


def test_a_constant_decay_warms_up_and_a_power_one_forgets_the_start_at_once():
    constant = ConstantAverageConfig(decay=0.999)
    assert decays(constant, 1) == (2 / 11,)
    assert decays(constant, 10**6) == (0.999,)
    assert decays(POWER, 1) == (0.0, 0.0)
    assert kinds_of(constant) == ("ema",)
    assert kinds_of(POWER) == ("ema", "ema_0.1")
