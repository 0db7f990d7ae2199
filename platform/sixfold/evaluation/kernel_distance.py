"""Kernel distance: the unbiased squared MMD with a cubic kernel, "KID" on Inception features (1801.01401)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def kernel_distance(first: Float[Tensor, "n d"], second: Float[Tensor, "m d"], *, block: int = 4096) -> float:
    """Return the unbiased estimate of MMD^2 under k(x, y) = (x.y / d + 1)^3, over all pairs; it may be negative.

    Its expectation does not depend on the numbers of samples and is 0 for equal distributions.
    """
    assert min(len(first), len(second)) >= 2, "the unbiased estimate needs two samples of each"
    within = _mean_off_diagonal(first.double(), block) + _mean_off_diagonal(second.double(), block)
    between = _kernel_sum(first.double(), second.double(), block) / (len(first) * len(second))
    return within - 2.0 * between


def _mean_off_diagonal(features: Float[Tensor, "n d"], block: int) -> float:
    """Return the mean kernel over pairs of different samples."""
    diagonal = (features.square().sum(1) / features.shape[1] + 1.0).pow(3).sum().item()
    return (_kernel_sum(features, features, block) - diagonal) / (len(features) * (len(features) - 1))


def _kernel_sum(first: Float[Tensor, "n d"], second: Float[Tensor, "m d"], block: int) -> float:
    """Return the sum of the kernel over all pairs, ``block`` rows at a time."""
    return sum(
        ((rows @ second.T / first.shape[1] + 1.0).pow(3).sum().item() for rows in torch.split(first, block)), 0.0
    )
