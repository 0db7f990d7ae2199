"""Every prediction on every path converts to every other and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sixfold.paths.config import EDMPathConfig, RectifiedFlowConfig, VEConfig, VPCosineConfig, VPLinearConfig
from sixfold.paths.predictions import Endpoints, convert, express, squared_error_scale

PATHS = [RectifiedFlowConfig(), VPLinearConfig(), VPCosineConfig(), VEConfig(), EDMPathConfig()]
QUANTITIES = ["velocity", "noise", "data", "v", "edm", "score"]


@pytest.mark.parametrize("source", QUANTITIES)
@settings(max_examples=40, deadline=None)
@given(
    config=st.sampled_from(PATHS),
    target=st.sampled_from(QUANTITIES),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
    data_std=st.floats(0.1, 2.0),
)
def test_converting_there_and_back_changes_nothing(source, config, target, fraction, seed, data_std):
    path = config.load()(config)
    generator = torch.Generator().manual_seed(seed)
    data, noise = torch.randn(2, 2, 3, 2, dtype=torch.float64, generator=generator)
    time = torch.full((2,), path.time_data + (path.time_noise - path.time_data) * fraction, dtype=torch.float64)
    at = path.coefficients(time)
    x = at.broadcast(data).alpha * data + at.broadcast(data).sigma * noise
    known = express(Endpoints(data, noise), source, at, data_std)
    there = convert(known, x, at, source=source, target=target, data_std=data_std)
    expected = express(Endpoints(data, noise), target, at, data_std)
    torch.testing.assert_close(there, expected, rtol=1e-6, atol=1e-8)
    back = convert(there, x, at, source=target, target=source, data_std=data_std)
    torch.testing.assert_close(back, known, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("quantity", QUANTITIES)
@settings(max_examples=20, deadline=None)
@given(config=st.sampled_from(PATHS), fraction=st.floats(0.02, 0.98))
def test_the_error_scale_is_the_sensitivity_of_the_data_to_the_prediction(quantity, config, fraction):
    path = config.load()(config)
    time = torch.full((1,), path.time_data + (path.time_noise - path.time_data) * fraction, dtype=torch.float64)
    at = path.coefficients(time)
    x, value = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([[0.7]], dtype=torch.float64)
    clean = [convert(value + step, x, at, source=quantity, target="data") for step in (0.0, 1.0)]
    torch.testing.assert_close(
        (clean[1] - clean[0]).square()[:, 0], squared_error_scale(quantity, at, 0.5), rtol=1e-6, atol=0
    )


@settings(max_examples=40, deadline=None)
@given(fraction=st.floats(0.01, 0.99), seed=st.integers(0, 2**31))
def test_the_score_of_gaussian_data_is_its_gradient(fraction, seed):
    """For data N(0, s^2) the score of p(x_t) is -x / (alpha^2 s^2 + sigma^2), whatever E[x0 | x] is converted from."""
    config, s = VPLinearConfig(), 0.7
    at = config.load()(config).coefficients(torch.full((1,), fraction, dtype=torch.float64))
    x = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    variance = at.alpha**2 * s**2 + at.sigma**2
    score = convert(at.alpha * s**2 / variance * x, x, at, source="data", target="score")
    torch.testing.assert_close(score, -x / variance)
