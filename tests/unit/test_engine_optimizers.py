"""Update rules against equations written out, and against torch's own implementations."""

import math

import pytest
import torch

from sixfold.engine.config import AdamWConfig, MuonAdamWSettings, MuonConfig
from sixfold.engine.newton_schulz import _QUINTICS, SMALLEST, STEPS_AT_MOST, newton_schulz
from sixfold.engine.optimizers import build_optimizer
from sixfold.models.network import ParameterTag, constant, normal, parameter


def _parameters(**tagged):
    generator = torch.Generator().manual_seed(0)
    made = {name: parameter(*shape, tag=tag) for name, (shape, tag) in tagged.items()}
    for value in made.values():
        value.data.copy_(torch.randn(value.shape, generator=generator))
    return made, {name: tag for name, (_, tag) in tagged.items()}


def _set_gradients(parameters, step):
    generator = torch.Generator().manual_seed(step)
    for value in parameters.values():
        value.grad = torch.randn(value.shape, generator=generator)


def test_adamw_follows_its_equations_and_the_tags():
    config = AdamWConfig(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5)
    parameters, tags = _parameters(
        matrix=((3, 4), normal(1.0)),
        bias=((3,), constant(0.0)),
        slow=((5,), ParameterTag(init="normal", scale=1.0, lr_scale=0.25)),
    )
    optimizer = build_optimizer(config, parameters, tags)
    assert set(optimizer.slots()) == set(parameters), "state exists before the first update"
    expected = {name: value.detach().double().clone() for name, value in parameters.items()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step in range(1, 6):
        _set_gradients(parameters, step)
        optimizer.step(factor := 1.0 / step)
        for name, value in expected.items():
            gradient = parameters[name].grad.double()
            lr = 0.1 * factor * tags[name].lr_scale
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            direction = (first[name] / (1 - 0.8**step)) / ((second[name] / (1 - 0.9**step)).sqrt() + 1e-3)
            expected[name] = value * (1 - lr * (0.5 if name == "matrix" else 0.0)) - lr * direction
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name].detach().double(), value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(optimizer.slots()[name]["exp_avg"].double(), first[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 8, 8), (3, 16, 5), (1, 4, 32), (2, 96, 128)])
@pytest.mark.parametrize("steps", [2, 3, 5])
def test_newton_schulz_keeps_directions_and_evens_singular_values(shape, steps):
    """Against an SVD, on spectra from the smallest value that so many steps bring home up to the largest."""
    generator = torch.Generator().manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    spectrum = torch.logspace(0.0, math.log10(2.0 * SMALLEST[-steps]), u.shape[-1])  # the bound is within a factor of 2
    projected = u.mT @ newton_schulz(u * (7.0 * spectrum) @ v, steps=steps) @ v.mT
    values = torch.diagonal(projected, dim1=-2, dim2=-1)
    assert ((values > 0.75) & (values < 1.25)).all(), values
    off_diagonal = projected - torch.diag_embed(values)
    assert off_diagonal.abs().max() < 1e-3, "the iteration is an odd polynomial of the matrix: no rotation"


def test_newton_schulz_lifts_what_is_out_of_reach_and_leaves_zero():
    matrices = torch.diag_embed(torch.tensor([[1.0, 1e-3, 1e-6, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    lifted = torch.diagonal(newton_schulz(matrices, steps=3), dim1=-2, dim2=-1)
    assert lifted[0, 1] > 50 * 1e-3 / 1.1
    assert lifted[0, 2] > 50 * 1e-6 / 1.1
    assert lifted[0, 3] == 0
    assert (lifted[1] == 0).all(), "a gradient that is zero, as behind a zero-initialised layer, stays so"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-100, -60, -40, -20, 60, 100])
def test_newton_schulz_knows_no_size(exponent, dtype):
    """Behind zero-initialised layers gradients start near nothing; powers of them must neither vanish nor grow."""
    matrices = torch.randn((3, 24, 16), generator=torch.Generator().manual_seed(2)).to(dtype)
    scaled = newton_schulz(matrices * 2.0**exponent, steps=4)
    torch.testing.assert_close(scaled, newton_schulz(matrices, steps=4), rtol=0, atol=0)


@pytest.mark.parametrize("row", range(STEPS_AT_MOST))
def test_the_quintics_are_minimax(row):
    """Chebyshev: the best quintic deviates from 1 by the same amount, with alternating sign, at four points."""
    a, b, c = _QUINTICS[row]
    x = torch.linspace(SMALLEST[row], 1.0, 100_001, dtype=torch.float64)
    value = a * x + b * x**3 + c * x**5
    largest, smallest = value[value.numel() // 1000 :].max(), value.min()
    middle = (largest + smallest) / 2
    slope = value.diff().sign()
    turns = value[1:-1][slope[1:] != slope[:-1]]
    assert len(turns) == 2
    extremes = torch.stack([value[0], *turns, value[-1]])
    deviation = (extremes - middle) / (largest - middle)
    torch.testing.assert_close(deviation, torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64), rtol=0, atol=2e-4)
    assert largest <= 1 / 1.01 + 1e-6 or row == STEPS_AT_MOST - 1


@pytest.mark.parametrize("shape", [(24, 6), (6, 24)])
def test_muon_follows_its_equations_and_torch_muon(shape):
    """The momentum is torch's; the update is that of an exact polar factor, within what the iteration leaves."""
    config = MuonConfig(lr=0.05, momentum=0.9, weight_decay=0.2, newton_schulz_steps=5)
    parameters, tags = _parameters(first=(shape, normal(1.0)), twin=(shape, normal(1.0)))
    theirs = [torch.nn.Parameter(value.detach().clone()) for value in parameters.values()]
    optimizer = build_optimizer(config, parameters, tags)
    reference = torch.optim.Muon(theirs, lr=0.05, momentum=0.9, nesterov=True)
    for step in range(3):
        _set_gradients(parameters, step)
        before = {name: value.detach().clone() for name, value in parameters.items()}
        for ours, other in zip(parameters.values(), theirs, strict=True):
            other.grad = ours.grad.clone()
        optimizer.step(0.5)
        reference.step()
        for (name, ours), other in zip(parameters.items(), theirs, strict=True):
            momentum = optimizer.slots()[name]["momentum_buffer"]
            torch.testing.assert_close(momentum, reference.state[other]["momentum_buffer"])
            u, _, v = torch.linalg.svd(torch.lerp(ours.grad, momentum, 0.9), full_matrices=False)
            rate = 0.5 * 0.05
            moved = (before[name] * (1 - rate * 0.2) - ours.detach()) / (rate * max(1.0, shape[0] / shape[1]) ** 0.5)
            values = torch.linalg.svdvals(moved)
            assert ((values > 0.75) & (values < 1.25)).all()
            overlap = torch.diagonal(u.mT @ moved @ v.mT)
            torch.testing.assert_close(overlap.sort().values, values.sort().values, rtol=1e-3, atol=1e-3)


def test_muon_treats_a_stack_as_its_matrices():
    config = MuonConfig(lr=0.05)
    stacked, stacked_tags = _parameters(stack=((3, 10, 4), normal(1.0)))
    single = {f"matrix{i}": torch.nn.Parameter(stacked["stack"].detach()[i].clone()) for i in range(3)}
    both = (
        build_optimizer(config, stacked, stacked_tags),
        build_optimizer(config, single, dict.fromkeys(single, normal(1.0))),
    )
    _set_gradients(stacked, 0)
    for index, value in enumerate(single.values()):
        value.grad = stacked["stack"].grad[index].clone()
    for optimizer in both:
        optimizer.step(1.0)
    torch.testing.assert_close(stacked["stack"].detach(), torch.stack([value.detach() for value in single.values()]))


def test_muon_leaves_the_rest_to_adamw():
    adamw = MuonAdamWSettings(lr=0.01, betas=(0.5, 0.6))
    tagged = {"matrix": ((4, 4), normal(1.0)), "norm": ((4,), constant(1.0))}
    mixed, tags = _parameters(**tagged)
    alone = {"norm": torch.nn.Parameter(mixed["norm"].detach().clone())}
    optimizer = build_optimizer(MuonConfig(lr=0.1, adamw=adamw), mixed, tags)
    reference = build_optimizer(AdamWConfig(lr=0.01, betas=(0.5, 0.6)), alone, tags)
    _set_gradients(mixed, 3)
    alone["norm"].grad = mixed["norm"].grad.clone()
    optimizer.step(0.5)
    reference.step(0.5)
    assert torch.equal(mixed["norm"], alone["norm"])
    assert {name: sorted(slots) for name, slots in optimizer.slots().items()} == {
        "matrix": ["momentum_buffer"],
        "norm": ["exp_avg", "exp_avg_sq"],
    }
