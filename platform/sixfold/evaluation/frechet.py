"""Frechet distance between Gaussians fitted to features (Heusel et al., 1706.08500).

Report it as "FD(extractor)": it is "FID" only with the original Inception network. Its bias falls as 1/n, so that
only distances at the same number of samples compare; :func:`half_split_fd` gives a yardstick from the data
themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor


class Moments(NamedTuple):
    """Mean and unbiased covariance of features, in float64."""

    mean: Float64[Tensor, " d"]
    covariance: Float64[Tensor, "d d"]


def moments(features: Float[Tensor, "n d"]) -> Moments:
    """Fit a Gaussian to at least two feature vectors."""
    assert len(features) >= 2, f"a covariance needs two samples, got {len(features)}"
    wide = features.double()
    mean = wide.mean(0)
    centred = wide - mean
    return Moments(mean, centred.T @ centred / (len(wide) - 1))


def frechet_distance(first: Moments, second: Moments) -> float:
    """Return |m1 - m2|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2).

    The root's trace is the sum of the roots of the eigenvalues of the symmetric A^1/2 B A^1/2: unlike the root of the
    unsymmetric A B it is real and accurate for singular covariances.
    """
    values, vectors = torch.linalg.eigh(first.covariance)
    root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    product = root @ second.covariance @ root
    trace_of_root = torch.linalg.eigvalsh(0.5 * (product + product.T)).clamp(min=0.0).sqrt().sum()
    traces = torch.trace(first.covariance) + torch.trace(second.covariance)
    return float((first.mean - second.mean).square().sum() + traces - 2.0 * trace_of_root)


def half_split_fd(features: Float[Tensor, "n d"], *, seed: int, splits: int = 4) -> float:
    """Return the distance between two random halves of the features, averaged over ``splits`` halvings.

    It measures what sampling error alone makes of two sets from one distribution: the scale that a generator's distance
    is divided by.
    """
    generator = torch.Generator().manual_seed(seed)
    half = len(features) // 2
    total = 0.0
    for _ in range(splits):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        total += frechet_distance(moments(features[order[:half]]), moments(features[order[half : 2 * half]]))
    return total / splits
