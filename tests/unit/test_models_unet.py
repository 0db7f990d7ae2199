"""The U-Net: shapes, conditions, arithmetic, forward-mode derivatives, and that no sample sees another."""

import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from model_helpers import randomized
from sixfold.models.network import parameter_tags
from sixfold.models.unet.config import UNetConfig

SMALL = {
    "image_size": 8,
    "channels": 2,
    "width": 16,
    "multipliers": [1, 2],
    "blocks_per_level": 1,
    "attention_sizes": [4],
    "head_width": 8,
    "groups": 4,
    "classes": 10,
}
X, TIME = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.5, 0.9])
CONDITION = {"label": torch.tensor([0, 4, 10])}


@pytest.fixture(scope="module")
def network():
    return randomized(UNetConfig(**SMALL), scale=0.1)


def test_a_fresh_network_predicts_zero_and_a_trained_one_reads_everything(network):
    config = UNetConfig(**SMALL)
    fresh = config.load()(config)
    with torch.no_grad():
        for value in fresh.parameters():
            tag = value.sixfold_tag
            value.copy_(torch.full_like(value, tag.scale) if tag.init == "constant" else 0.1 * torch.randn_like(value))
    assert fresh(X, TIME, CONDITION).abs().max() == 0
    out = network(X, TIME, CONDITION)
    assert out.shape == X.shape
    for changed in (
        network(X + 0.1, TIME, CONDITION),
        network(X, TIME + 0.05, CONDITION),
        network(X, TIME, {"label": torch.tensor([1, 5, 9])}),
    ):
        assert ((changed - out).flatten(1).norm(dim=1) > 1e-3).all()


def test_every_pixel_sees_every_pixel_of_its_own_image_alone(network):
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x, TIME, CONDITION)[1, 0, 0, 0], x)
    assert (gradient[1] != 0).all()
    assert (gradient[[0, 2]] == 0).all()


@pytest.mark.parametrize(
    "changes", [{}, {"multipliers": [1, 2, 2], "blocks_per_level": 2, "attention_sizes": [8, 2], "classes": 0}]
)
def test_flops_are_those_that_run(changes):
    config = UNetConfig(**(SMALL | changes))
    network = randomized(config, scale=0.1)
    with FlopCounterMode(display=False) as counter:
        out = network(X, TIME, CONDITION if config.classes else {})
    assert out.shape == X.shape
    assert network.forward_flops({"image": tuple(X.shape)}) == counter.get_total_flops()


def test_forward_mode_derivatives_are_the_finite_differences(network):
    twin = randomized(UNetConfig(**SMALL), scale=0.1).double()
    x, time = X.double(), TIME.double()
    generator = torch.Generator().manual_seed(1)
    along, rate = torch.randn(X.shape, generator=generator, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    _, found = torch.func.jvp(lambda a, b: twin(a, b, CONDITION), (x, time), (along, rate))
    step = 1e-4  # time passes through fp32 sinusoids
    ahead, behind = (twin(x + s * along, time + s * rate, CONDITION) for s in (step, -step))
    assert ((ahead - behind) / (2 * step) - found).abs().max() < 0.02 * found.abs().max()
    _, of_x = torch.func.jvp(lambda a: twin(a, time, CONDITION), (x,), (along,))
    ahead, behind = (twin(x + s * along, time, CONDITION) for s in (1e-6, -1e-6))
    torch.testing.assert_close(of_x, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-6)


def test_blocks_hold_nearly_all_parameters_and_all_are_tagged(network):
    tags = parameter_tags(network)
    in_blocks = sum(value.numel() for block in network.blocks() for value in block.parameters())
    total = sum(value.numel() for value in network.parameters())
    assert len(tags) == len(list(network.parameters()))
    assert in_blocks > 0.85 * total


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 7}, "levels need an image_size"),
        ({"groups": 32}, "groups must divide"),
        ({"attention_sizes": [3]}, "attention_sizes must be among"),
        ({"head_width": 5}, "head_width must divide"),
    ],
)
def test_settings_that_do_not_fit_are_explained(changes, message):
    with pytest.raises(ValidationError, match=message):
        UNetConfig(**(SMALL | changes))
