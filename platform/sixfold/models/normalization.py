"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sixfold.models.network import constant, parameter
from sixfold.models.precision import compute_dtype


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + epsilon) over the last dimension."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = parameter(width, tag=constant(1.0))

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Normalise in fp32 internally; the result has the type that matrix products run in."""
        weight = self.weight.to(x.dtype)
        normalized: Tensor
        if x.device.type == "cpu" and x.dtype == torch.float32:
            normalized = _RMSNorm.apply(x, weight, self.epsilon)  # type: ignore[no-untyped-call]  # torch's
        else:
            normalized = nn.functional.rms_norm(x, weight.shape, weight, self.epsilon)
        return normalized.to(compute_dtype(x))


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / rms(x) and z = r x: dw = sum g z, dx = r (g w - z mean(g w z)).

    On CUDA torch has a kernel; on the CPU it leaves autograd a chain of six operations, whose backward is fifteen more.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return x * _inverse_rms(x, epsilon) * weight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, ctx.epsilon = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        inverse = _inverse_rms(x, ctx.epsilon)  # anew, so that second derivatives see that it depends on x
        unit = x * inverse
        product = gradient * unit
        mean = (product @ weight)[..., None] / x.shape[-1]
        x_gradient = torch.addcmul(gradient * weight, unit, mean, value=-1.0) * inverse
        return x_gradient, product.reshape(-1, x.shape[-1]).sum(0), None

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, weight_tangent: Tensor | None, _: None) -> Tensor:
        x, weight = ctx.saved_tensors
        inverse = _inverse_rms(x, ctx.epsilon)
        unit = x * inverse
        tangent = torch.zeros_like(x) if weight_tangent is None else unit * weight_tangent
        if x_tangent is not None:
            mean = (unit * x_tangent).mean(-1, keepdim=True)
            tangent = tangent + (x_tangent - unit * mean) * inverse * weight
        return tangent


def _inverse_rms(x: Float[Tensor, "*batch width"], epsilon: float) -> Float[Tensor, "*batch 1"]:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.rsqrt(norm.square() / x.shape[-1] + epsilon)
