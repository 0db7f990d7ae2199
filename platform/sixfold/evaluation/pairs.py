"""Distances of all pairs of features."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor


def squared_distances(first: Float64[Tensor, "n d"], second: Float64[Tensor, "m d"]) -> Float64[Tensor, "n m"]:
    """Squared distances, rounded (also below 0): by one product, in a tenth of the time that differences take."""
    squares = first.square().sum(1, keepdim=True) + second.square().sum(1)
    return torch.addmm(squares, first, second.T, alpha=-2.0)
