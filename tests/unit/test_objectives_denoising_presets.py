"""Every preset in ``recipes/_base/denoising`` against its loss floor on Gaussian data, in closed form."""

from pathlib import Path

import pytest
import torch

from exact_denoisers import ExactDenoiser, Unconditional, gaussian_posterior
from sixfold.config.composition import compose_file
from sixfold.distributed.randomness import PositionRandom
from sixfold.errors import RecipeError
from sixfold.models.noise_uncertainty.config import NoiseUncertaintyConfig
from sixfold.objectives.contract import Batch, Phase, Progress
from sixfold.objectives.denoising.config import DenoisingConfig
from sixfold.objectives.denoising.objective import Denoising
from sixfold.paths.config import EDMPathConfig, OptimalTransportCouplingConfig

FOLDER = Path(__file__).parents[2] / "recipes" / "_base" / "denoising"
NAMES = ["ddpm", "v", "edm", "vp_sde", "ve_sde", "rectified_flow"]
STD = 0.35
QUANTILES = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


def preset(name, **changes):
    return DenoisingConfig.model_validate(compose_file(FOLDER / f"{name}.yaml").values["objective"] | changes)


def ndtri(q):
    return torch.special.ndtri(q)


def ddpm_floor():
    """Var(e | x) = s^2 ab / (ab s^2 + 1 - ab), a mean over the 1000 levels."""
    ab = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    return (STD**2 * ab / (ab * STD**2 + 1 - ab)).mean()


def v_floor():
    """min(S, 5) Var(x0 | x) with Var(x0 | x) = s^2 (1 - ab) / (ab s^2 + 1 - ab), over the cosine schedule."""
    angle = (QUANTILES + 0.008) / 1.008 * torch.pi / 2
    ab = torch.cos(angle) ** 2 / torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2, dtype=torch.float64)) ** 2
    variance = STD**2 * (1 - ab) / (ab * STD**2 + 1 - ab)
    return ((ab / (1 - ab)).clamp(max=5.0) * variance).mean()


def edm_floor():
    """(sigma^2 + sd^2) / (sigma sd)^2 Var(x0 | x) with Var(x0 | x) = s^2 sigma^2 / (s^2 + sigma^2) and sd = 0.5."""
    sigma = torch.exp(-1.2 + 1.2 * ndtri(QUANTILES))
    return ((sigma**2 + 0.25) / (0.25 * sigma**2) * STD**2 * sigma**2 / (STD**2 + sigma**2)).mean()


def vp_sde_floor():
    """As DDPM's, at alpha^2 = exp(-(0.1 t + 19.9 t^2 / 2))."""
    ab = torch.exp(-(0.1 * QUANTILES + 9.95 * QUANTILES**2))
    return (STD**2 * ab / (ab * STD**2 + 1 - ab)).mean()


def ve_sde_floor():
    """Var(e | x) = s^2 / (s^2 + sigma^2) at sigma = 0.01 * 5000^t."""
    sigma = 0.01 * 5000**QUANTILES
    return (STD**2 / (STD**2 + sigma**2)).mean()


def rectified_flow_floor():
    """s^2 / ((1 - t)^2 s^2 + t^2) at logit-normal times."""
    t = torch.sigmoid(ndtri(QUANTILES))
    return (STD**2 / ((1 - t) ** 2 * STD**2 + t**2)).mean()


FLOORS = {name: globals()[f"{name}_floor"] for name in NAMES}


def images(count, std=STD, size=8):
    positions = torch.arange(count)
    return Batch({"image": 0.2 + std * PositionRandom(9, positions).normal("data", (1, size, size))}, positions)


def test_there_is_a_floor_for_every_preset():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*NAMES, "learned_uncertainty"}


@pytest.mark.parametrize("name", NAMES)
def test_the_exact_network_reaches_the_presets_floor(name):
    config = preset(name)
    objective = Denoising(config, {"denoiser": Unconditional()})
    nets = {"denoiser": ExactDenoiser(config, gaussian_posterior(0.2, STD))}
    batch = images(4096)
    held_out = objective.evaluate(nets, batch, PositionRandom(0, batch.positions))["loss"]
    assert (held_out.total / held_out.count).item() == pytest.approx(FLOORS[name]().item(), rel=0.01)


@pytest.mark.parametrize("name", ["edm", "rectified_flow"])
def test_learned_uncertainty_finds_the_log_of_the_loss_at_each_time_and_weighs_all_times_alike(name):
    """The minimum over u of E / e^u + u is u = ln E, where the quotient is 1 at every time."""
    config = preset(name, uncertainty="uncertainty")
    settings = NoiseUncertaintyConfig(frequencies=12)
    objective = Denoising(config, {"denoiser": Unconditional(), "uncertainty": settings})
    assert objective.roles["uncertainty"].kind == "trainable"
    torch.manual_seed(0)
    network = settings.load()(settings)
    torch.nn.init.zeros_(network.weight)
    torch.nn.init.zeros_(network.bias)
    nets = {"denoiser": ExactDenoiser(config, gaussian_posterior(0.2, STD)), "uncertainty": network}
    batch = images(1024, size=4)
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=15, line_search_fn="strong_wolfe")
    phase = objective.phases(Progress(samples=0, step=0, total_steps=1))[0]
    assert phase.trains == ("denoiser", "uncertainty")

    def loss():
        optimizer.zero_grad()
        terms = objective(nets, batch, phase, PositionRandom(0, batch.positions))
        (terms.loss / terms.count).backward()
        return terms.loss.detach() / terms.count

    optimizer.step(loss)
    terms = objective(nets, batch, phase, PositionRandom(0, batch.positions))
    plain = terms.metrics["squared_error"]
    assert (plain.total / plain.count).item() == pytest.approx(FLOORS[name]().item(), rel=0.08)
    config_log = torch.log(torch.tensor(FLOORS[name]().item()))
    assert (terms.loss / terms.count).item() < 1.0 + config_log.item() + 0.01  # Jensen: mean ln E is below ln mean E


def test_offset_noise_is_shared_by_the_pixels_of_a_channel_and_has_its_variance():
    config = DenoisingConfig(offset_noise=0.5)
    objective = Denoising(config, {"denoiser": Unconditional()})
    batch = Batch({"image": torch.zeros(4000, 2, 3, 3)}, torch.arange(4000))
    noise = objective._noise(batch["image"], batch, PositionRandom(0, batch.positions), "noise", whole_groups=True)
    plain = Denoising(DenoisingConfig(), {"denoiser": Unconditional()})._noise(
        batch["image"], batch, PositionRandom(0, batch.positions), "noise", whole_groups=True
    )
    shared = noise - plain
    assert torch.allclose(shared, shared[:, :, :1, :1].expand_as(shared), atol=1e-6)
    assert shared[:, :, 0, 0].std().item() == pytest.approx(0.5, rel=0.03)
    assert torch.corrcoef(shared[:, :, 0, 0].T)[0, 1].abs() < 0.05


class Zero(torch.nn.Module):
    def forward(self, x, time, condition):
        return torch.zeros_like(x)


def coupled_loss(config, micro, count=64):
    objective = Denoising(config, {"denoiser": Unconditional()})
    batch = images(count, size=2)
    phase = Phase(name="main", trains=("denoiser",))
    return sum(
        objective({"denoiser": Zero()}, part, phase, PositionRandom(3, part.positions)).loss.item()
        for part in batch.split(micro)
    )


def test_optimal_transport_shortens_paths_and_does_not_depend_on_the_micro_batch():
    """With the network 0 the loss is the mean of |e - x0|^2, which the coupling minimises."""
    config = DenoisingConfig(coupling=OptimalTransportCouplingConfig(group=16))
    whole = coupled_loss(config, 64)
    assert coupled_loss(config, 16) == pytest.approx(whole, rel=1e-6)
    assert coupled_loss(config, 32) == pytest.approx(whole, rel=1e-6)
    assert whole < 0.9 * coupled_loss(DenoisingConfig(), 64)
    with pytest.raises(RecipeError, match="8 of the 16 samples"):
        coupled_loss(config, 8)


def test_edm_on_data_of_its_own_standard_deviation_has_a_floor_of_one():
    config = preset("edm", data_std=STD, path=EDMPathConfig())
    objective = Denoising(config, {"denoiser": Unconditional()})
    batch = Batch({"image": images(2048)["image"] - 0.2}, torch.arange(2048))
    nets = {"denoiser": ExactDenoiser(config, gaussian_posterior(0.0, STD))}
    loss = objective.evaluate(nets, batch, PositionRandom(0, batch.positions))["loss"]
    assert (loss.total / loss.count).item() == pytest.approx(1.0, rel=0.01)
