"""What networks for perceptual losses return, and the distance between two images by it (LPIPS, arXiv 1801.03924)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

EMBEDDING = "embedding"
"""The feature vector ``[n, features]`` in which sets of images are compared; all other features are maps."""


def unit_normalized(x: Float[Tensor, "n c h w"], epsilon: float = 1e-10) -> Float[Tensor, "n c h w"]:
    """x / sqrt(|x|^2 + epsilon) over channels; unlike x / (|x| + epsilon), it has a gradient at 0."""
    return x * torch.rsqrt(x.square().sum(1, keepdim=True) + epsilon)


def perceptual_distance(
    features: Mapping[str, Float[Tensor, "n ..."]], others: Mapping[str, Float[Tensor, "n ..."]]
) -> Float[Tensor, " n"]:
    """Sum over maps of the squared distance of their channels, averaged over positions (LPIPS, equation 1).

    Maps come normalised, and scaled by the square root of their channels' weights.
    """
    distances = [
        (features[name].float() - others[name].float()).square().sum(1).flatten(1).mean(1)
        for name in features
        if name != EMBEDDING
    ]
    return torch.stack(distances).sum(0)
