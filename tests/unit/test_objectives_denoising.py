"""The denoising objective against closed forms on data whose exact denoiser is known."""

import math

import pytest
import torch
from torch import nn

from exact_denoisers import ExactDenoiser, Unconditional, finite_posterior, gaussian_posterior
from sixfold.distributed.randomness import PositionRandom
from sixfold.errors import DataError
from sixfold.objectives.contract import Batch, Phase
from sixfold.objectives.denoising.config import DenoisingConfig
from sixfold.objectives.denoising.objective import Denoising
from sixfold.objectives.stratification import stratified_quantiles
from sixfold.paths.config import (
    EDMPathConfig,
    EDMWeightingConfig,
    LogitNormalTimeConfig,
    LogNormalTimeConfig,
    MinSNRWeightingConfig,
    VEConfig,
    VPCosineConfig,
    VPLinearConfig,
)

PRESETS = {
    "rectified_flow": DenoisingConfig(),
    "ddpm": DenoisingConfig(path=VPLinearConfig(), prediction="noise"),
    "improved_ddpm_v": DenoisingConfig(path=VPCosineConfig(), prediction="v", weighting=MinSNRWeightingConfig()),
    "score_sde_ve": DenoisingConfig(path=VEConfig(), prediction="noise"),
    "edm": DenoisingConfig(
        path=EDMPathConfig(), prediction="edm", time=LogNormalTimeConfig(), weighting=EDMWeightingConfig()
    ),
    "data_on_rectified_flow": DenoisingConfig(prediction="data", time=LogitNormalTimeConfig()),
}

PHASE = Phase(name="main", trains=("denoiser",))


def images_of(mean: float, std: float, count: int, size: int = 8, start: int = 0) -> Batch:
    positions = torch.arange(start, start + count)
    image = mean + std * PositionRandom(99, positions).normal("data", (1, size, size))
    return Batch({"image": image, "label": positions % 10}, positions)


def evaluate(config: DenoisingConfig, network: nn.Module, batch: Batch) -> dict[str, float]:
    objective = Denoising(config, {"denoiser": Unconditional()})
    sums = objective.evaluate({"denoiser": network}, batch, PositionRandom(0, batch.positions))
    return {name: float(value.total / value.count) for name, value in sums.items()}


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.5), (-0.3, 0.2), (0.5, 1.0)])
def test_the_rectified_flow_floor_is_s_pi_over_two(mean, std):
    config = DenoisingConfig()
    network = ExactDenoiser(config, gaussian_posterior(mean, std))
    loss = evaluate(config, network, images_of(mean, std, 4096))["loss"]
    assert loss == pytest.approx(std * math.pi / 2, rel=0.01)


@pytest.mark.parametrize("sigma", [0.003, 0.05, 0.5, 3.0, 60.0])
def test_the_edm_floor_is_one_at_every_noise_level(sigma):
    config = DenoisingConfig(
        path=EDMPathConfig(),
        prediction="edm",
        time=LogNormalTimeConfig(mean=math.log(sigma), std=1e-3),
        weighting=EDMWeightingConfig(),
        data_std=0.5,
    )
    network = ExactDenoiser(config, gaussian_posterior(0.0, 0.5))
    assert evaluate(config, network, images_of(0.0, 0.5, 2048))["loss"] == pytest.approx(1.0, rel=0.01)


def test_the_exact_velocity_is_the_closed_form():
    mean, std = 0.4, 0.7
    config = DenoisingConfig()
    network = ExactDenoiser(config, gaussian_posterior(mean, std)).double()
    t = torch.linspace(0.05, 1.0, 20, dtype=torch.float64)
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    variance = (1 - t) ** 2 * std**2 + t**2
    expected = -mean + ((t - (1 - t) * std**2) / variance)[:, None] * (x - (1 - t)[:, None] * mean)
    torch.testing.assert_close(network(x, t, {}), expected)


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_no_network_beats_the_exact_one(preset):
    """A shift or a scale of the posterior mean, either way, raises the loss."""
    config, batch = PRESETS[preset], images_of(0.2, 0.5, 1024)
    exact = gaussian_posterior(0.2, 0.5)
    best = evaluate(config, ExactDenoiser(config, exact), batch)["loss"]
    for scale, offset in [(0.9, 0.0), (1.1, 0.0), (1.0, -0.1), (1.0, 0.1)]:
        worse = ExactDenoiser(config, lambda x, a, s, k=scale, b=offset: k * exact(x, a, s) + b)
        assert evaluate(config, worse, batch)["loss"] > best


def test_on_a_finite_data_set_the_best_denoiser_is_the_softmax_weighted_mean():
    points = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    positions = torch.arange(8000)
    batch = Batch({"image": points[positions % 5]}, positions)
    config = DenoisingConfig(prediction="data")
    losses = {
        temperature: evaluate(config, ExactDenoiser(config, finite_posterior(points, temperature)), batch)["loss"]
        for temperature in (0.7, 1.0, 1.4)
    }
    assert losses[1.0] == min(losses.values())
    t = torch.full((1,), 0.4)
    posterior = torch.distributions.Normal(0.6 * points.flatten(1), 0.4)
    x = torch.full((1, 1, 2, 2), 0.1)
    weights = posterior.log_prob(x.flatten(1)).sum(1).softmax(0)
    by_bayes = (weights[:, None] * points.flatten(1)).sum(0)
    network = ExactDenoiser(config, finite_posterior(points))
    torch.testing.assert_close(network(x, t, {})[0].flatten(), by_bayes)


class Echo(nn.Module):
    """Remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.times, self.labels = [], []

    def forward(self, x, time, condition):
        self.times.append(time)
        self.labels.append(condition.get("label"))
        return self.weight * x


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_micro_batches_draw_and_sum_the_same(preset):
    config = PRESETS[preset].model_copy(update={"label_drop": 0.3})
    objective = Denoising(config, {"denoiser": Unconditional(null_values={"label": 10})})
    batch = images_of(0.0, 0.5, 48)
    results = []
    for micro in (48, 7):
        network = Echo()
        terms = [
            objective({"denoiser": network}, part, PHASE, PositionRandom(3, part.positions))
            for part in batch.split(micro)
        ]
        sum(term.loss for term in terms).backward()
        totals = {name: sum(term.metrics[name].total for term in terms) for name in terms[0].metrics}
        results.append((network, sum(term.loss.detach() for term in terms), sum(t.count for t in terms), totals))
    (whole, loss, count, totals), (parts, loss_of_parts, count_of_parts, totals_of_parts) = results
    assert torch.equal(torch.cat(whole.times), torch.cat(parts.times))
    assert torch.equal(torch.cat(whole.labels), torch.cat(parts.labels))
    torch.testing.assert_close(loss, loss_of_parts, rtol=1e-6, atol=0)
    torch.testing.assert_close(whole.weight.grad, parts.weight.grad, rtol=1e-5, atol=1e-6)
    assert count == count_of_parts == 48
    torch.testing.assert_close(totals, totals_of_parts, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sum(totals.values()), loss, rtol=1e-5, atol=0)


def test_labels_are_dropped_at_the_rate_asked_for_and_never_in_evaluation():
    objective = Denoising(DenoisingConfig(label_drop=0.1), {"denoiser": Unconditional(null_values={"label": 10})})
    network, batch = Echo(), images_of(0.0, 0.5, 4000, size=1)
    objective({"denoiser": network}, batch, PHASE, PositionRandom(0, batch.positions))
    objective.evaluate({"denoiser": network}, batch, PositionRandom(0, batch.positions))
    trained, evaluated = network.labels
    dropped = trained == 10
    assert dropped.float().mean() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(trained[~dropped], batch["label"][~dropped])
    assert torch.equal(evaluated, batch["label"])


def test_a_condition_that_the_data_lack_is_named():
    objective = Denoising(DenoisingConfig(), {"denoiser": Unconditional(null_values={"caption": 0})})
    batch = images_of(0.0, 0.5, 4)
    with pytest.raises(DataError, match="caption, which the data lack"):
        objective({"denoiser": Echo()}, batch, PHASE, PositionRandom(0, batch.positions))


def test_evaluation_takes_stratified_times_whatever_the_seed():
    objective, network = Denoising(DenoisingConfig(), {"denoiser": Unconditional()}), Echo()
    batch = images_of(0.0, 0.5, 64, start=1000)
    for seed in (0, 1):
        objective.evaluate({"denoiser": network}, batch, PositionRandom(seed, batch.positions))
    assert torch.equal(network.times[0], stratified_quantiles(batch.positions))
    assert torch.equal(network.times[0], network.times[1])


def test_stratified_times_make_evaluation_nearly_free_of_noise():
    """Over windows of 64 positions the rectified flow's floor, s^2 / C(t), varies far less than under random times."""

    def floor(t):
        return 0.25 / ((1 - t) ** 2 * 0.25 + t**2)

    windows = torch.arange(64 * 100)
    stratified = floor(stratified_quantiles(windows)).reshape(100, 64).mean(1)
    random = floor(PositionRandom(0, windows).uniform("time")).reshape(100, 64).mean(1)
    assert stratified.mean() == pytest.approx(math.pi / 4, rel=1e-3)
    assert stratified.var() < 0.05 * random.var()


def test_stratified_quantiles_fill_every_stratum_far_from_zero():
    quantiles = stratified_quantiles(torch.arange(10**12, 10**12 + 1024))
    assert torch.histc(quantiles, 64, 0, 1).min() >= 14
    assert quantiles.min() > 0
    assert quantiles.max() < 1
