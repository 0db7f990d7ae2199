"""CFG-Zero*, autoguidance and their sums against their algebra."""

import pytest
import torch

from exact_denoisers import ExactDenoiser, Unconditional, gaussian_posterior
from sixfold.errors import RecipeError
from sixfold.models.dit.config import DiTConfig
from sixfold.models.trained.network import TrainedNetwork
from sixfold.objectives.denoising.config import DenoisingConfig
from sixfold.paths.config import EDMPathConfig, RectifiedFlowConfig, VPCosineConfig
from sixfold.samplers.config import (
    AutoguidanceConfig,
    CFGConfig,
    CFGZeroConfig,
    CombinedGuidanceConfig,
    DPMSolverConfig,
    EulerConfig,
)
from sixfold.samplers.contract import SampleRequest
from sixfold.samplers.guidance import Guided, fitted

PATH = RectifiedFlowConfig().load()(RectifiedFlowConfig())
X = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
CONDITION, NULL = {"label": torch.tensor([1, 2, 3])}, {"label": torch.tensor([9, 9, 9])}


def network(x, time, condition):
    return x * condition["label"].reshape(-1, 1, 1, 1) + torch.arange(4.0).reshape(1, 1, 2, 2)


def weak(x, time, condition):
    return 0.5 * x


def guided(config, time=0.5):
    value = Guided(config=config, path=PATH, predict=network, guide=weak, condition=CONDITION, null=NULL)
    return value(X, torch.full((3,), time))


C, U = network(X, None, CONDITION), network(X, None, NULL)


def test_the_fitted_multiple_is_the_nearest_one():
    multiple = fitted(U, C)
    residual = ((C - multiple) * U).flatten(1).sum(1)
    assert residual.abs().max() < 1e-4
    assert torch.linalg.matrix_rank(torch.stack([multiple[0].flatten(), U[0].flatten()])) == 1


def test_cfg_zero_star_pushes_away_from_the_fitted_prediction():
    scale = ((C * U).flatten(1).sum(1) / (U * U).flatten(1).sum(1)).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(guided(CFGZeroConfig(scale=3.0)), scale * U + 3.0 * (C - scale * U))


def test_autoguidance_pushes_away_from_the_weaker_network():
    torch.testing.assert_close(guided(AutoguidanceConfig(scale=2.0)), 0.5 * X + 2.0 * (C - 0.5 * X))


def test_pushes_of_combined_guidances_add_up_each_within_its_interval():
    config = CombinedGuidanceConfig(parts=[CFGConfig(scale=3.0, low=0.4), AutoguidanceConfig(scale=2.0, high=0.6)])
    torch.testing.assert_close(guided(config, 0.5), C + 2.0 * (C - U) + (C - 0.5 * X))
    torch.testing.assert_close(guided(config, 0.3), C + (C - 0.5 * X))
    torch.testing.assert_close(guided(config, 0.7), C + 2.0 * (C - U))


def test_intervals_are_kept_sample_by_sample():
    value = Guided(
        config=CFGConfig(scale=3.0, high=0.6), path=PATH, predict=network, guide=None, condition=CONDITION, null=NULL
    )
    found = value(X, torch.tensor([0.5, 0.7, 0.5]))
    expected = torch.where(torch.tensor([1, 0, 1]).bool().reshape(-1, 1, 1, 1), U + 3.0 * (C - U), C)
    torch.testing.assert_close(found, expected)


class Labelled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.times = []

    def forward(self, x, time, condition):
        self.times.append(time[0].item())
        return 0.3 * x + 0.05 * condition["label"].float().reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("solver", [EulerConfig, DPMSolverConfig])
def test_cfg_zero_star_does_not_move_at_first(solver):
    """With the network's velocity zero until t = .8, the sample is that of a flow that starts there."""
    config = solver(steps=10, guidance=CFGZeroConfig(scale=1.0, zero_fraction=0.2))
    sampler = config.load()(config, DenoisingConfig(), {"denoiser": Unconditional(null_values={"label": 10})})
    request = SampleRequest(seed=0, numbers=torch.arange(2), conditions={"label": torch.tensor([1, 2])})
    seen = []

    class Recorder(Labelled):
        def forward(self, x, time, condition):
            seen.append((round(time[0].item(), 3), x[-2:].clone()))
            return super().forward(x, time, condition)

    sampler({"denoiser": Recorder()}, request)
    by_time = dict(seen)
    torch.testing.assert_close(by_time[1.0], by_time[0.9])
    torch.testing.assert_close(by_time[1.0], by_time[0.8], atol=1e-5, rtol=0)
    assert not torch.allclose(by_time[1.0], by_time[0.7])


def trained(objective):
    dit = DiTConfig(image_size=4, patch_size=2, channels=1, width=8, depth=1, heads=1)
    return TrainedNetwork(architecture=dit, objective=objective, run=None, role="denoiser", averaged=True)


def test_a_guide_that_predicts_another_quantity_is_converted():
    """Main: velocity, guide: noise, both exact; pushing away from an equal network changes nothing."""
    objective, other = DenoisingConfig(guide="guide"), DenoisingConfig(prediction="noise")
    nets = {
        "denoiser": ExactDenoiser(objective, gaussian_posterior(0.1, 0.1)),
        "guide": ExactDenoiser(other, gaussian_posterior(0.1, 0.1)),
    }
    request = SampleRequest(seed=0, numbers=torch.arange(4), conditions={})
    images = []
    for guidance in (AutoguidanceConfig(scale=3.0, high=0.99), AutoguidanceConfig(scale=1.0)):
        config = EulerConfig(steps=20, guidance=guidance)
        sampler = config.load()(config, objective, {"denoiser": Unconditional(), "guide": trained(other)})
        images.append(sampler(nets, request)["image"])
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-3)
    assert len(nets["guide"].calls) == 19  # t = 1 is outside the interval


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (DenoisingConfig(), r"objective\.guide names none"),
        (DenoisingConfig(guide="guide", path=VPCosineConfig()), "another path"),
    ],
)
def test_autoguidance_without_a_guide_or_with_one_on_another_path_is_refused(objective, message):
    config = EulerConfig(guidance=AutoguidanceConfig(scale=2.0))
    networks = {"denoiser": Unconditional(), "guide": trained(DenoisingConfig(path=EDMPathConfig()))}
    build = config.load()
    with pytest.raises(RecipeError, match=message):
        build(config, objective, networks)
