"""Directional derivatives of a wrapped network, forward mode."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def directional_derivative(
    function: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Return ``function(*at)`` and its derivative along ``along``, both without gradient.

    Attention is computed by its definition meanwhile: fused kernels have no forward-mode derivative.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        value, derivative = torch.func.jvp(function, at, along)[:2]
    return value.detach(), derivative.detach()
