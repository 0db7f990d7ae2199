"""The hand-written RMSNorm against torch's: values, gradients of both orders, forward mode."""

import pytest
import torch
from torch.nn.functional import rms_norm

from sixfold.models.normalization import RMSNorm, _RMSNorm

EPSILON = 1e-2  # large enough to matter


def _inputs(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(shape[-1], generator=generator, dtype=dtype, requires_grad=True)
    return x, weight, torch.randn(shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 3, 16), (4,)])
def test_values_and_gradients_are_those_of_torch(shape):
    x, weight, direction = _inputs(shape)
    norm = RMSNorm(shape[-1], EPSILON)
    norm.weight.data.copy_(weight.detach())
    ours, theirs = norm(x), rms_norm(x, shape[-1:], weight, EPSILON)
    torch.testing.assert_close(ours, theirs)
    gradients = torch.autograd.grad(ours, (x, norm.weight), direction)
    for mine, other in zip(gradients, torch.autograd.grad(theirs, (x, weight), direction), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_derivatives_of_both_orders_and_modes_are_those_of_differences():
    x, weight, _ = _inputs((2, 3, 4), torch.float64)
    arguments = (lambda a, b: _RMSNorm.apply(a, b, EPSILON)), (x, weight)
    assert torch.autograd.gradcheck(*arguments, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(*arguments)


def test_a_network_of_it_passes_torch_func():
    x, weight, tangent = (value.detach() for value in _inputs((2, 6)))
    ours = torch.func.jvp(lambda a: _RMSNorm.apply(a, weight, EPSILON), (x,), (tangent,))
    theirs = torch.func.jvp(lambda a: rms_norm(a, (6,), weight, EPSILON), (x,), (tangent,))
    torch.testing.assert_close(ours, theirs)
    each = torch.func.vmap(lambda a: _RMSNorm.apply(a, weight, EPSILON))(x)
    torch.testing.assert_close(each, theirs[0])
