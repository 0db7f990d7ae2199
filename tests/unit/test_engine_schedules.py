"""Schedules against their closed forms."""

import math

import pytest

from sixfold.engine.config import ConstantScheduleConfig, CosineConfig, WSDConfig
from sixfold.engine.schedules import learning_rate_factor

TOTAL = 100


@pytest.mark.parametrize(
    "config", [ConstantScheduleConfig(warmup_steps=10), CosineConfig(warmup_steps=10), WSDConfig(warmup_steps=10)]
)
def test_warm_up_is_linear_and_reaches_the_peak(config):
    assert [learning_rate_factor(config, step, TOTAL) for step in range(11)] == pytest.approx(
        [(step + 1) / 10 for step in range(10)] + [1.0]
    )


def test_constant_stays():
    assert all(learning_rate_factor(ConstantScheduleConfig(), step, TOTAL) == 1.0 for step in range(2 * TOTAL))


def test_cosine_is_half_a_cosine_to_its_floor():
    config = CosineConfig(warmup_steps=20, final_fraction=0.1)
    for step in range(20, 101):
        expected = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 20) / 80))
        assert learning_rate_factor(config, step, TOTAL) == pytest.approx(expected, abs=1e-12)
    assert learning_rate_factor(config, 60, TOTAL) == pytest.approx(0.55)
    assert learning_rate_factor(config, 500, TOTAL) == pytest.approx(0.1)


@pytest.mark.parametrize(("decay", "halfway"), [("linear", 0.6), ("sqrt", 1 - 0.8 * math.sqrt(0.5))])
def test_wsd_is_flat_and_then_decays(decay, halfway):
    config = WSDConfig(warmup_steps=5, decay_fraction=0.4, final_fraction=0.2, decay=decay)
    assert all(learning_rate_factor(config, step, TOTAL) == 1.0 for step in range(5, 61))
    assert learning_rate_factor(config, 80, TOTAL) == pytest.approx(halfway)
    assert learning_rate_factor(config, 100, TOTAL) == pytest.approx(0.2)
    factors = [learning_rate_factor(config, step, TOTAL) for step in range(60, 101)]
    assert factors == sorted(factors, reverse=True)


def test_wsd_without_decay_and_with_a_decay_longer_than_what_warm_up_leaves():
    assert learning_rate_factor(WSDConfig(decay_fraction=0.0), 99, TOTAL) == 1.0
    config = WSDConfig(warmup_steps=50, decay_fraction=1.0)
    assert learning_rate_factor(config, 50, TOTAL) == 1.0
    assert learning_rate_factor(config, 75, TOTAL) == pytest.approx(0.5)
