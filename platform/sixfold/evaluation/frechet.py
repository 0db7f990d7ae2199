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

from sixfold.evaluation.bootstrap import margin_of, resample_weights
from sixfold.evaluation.config import FrechetConfig
from sixfold.evaluation.contract import Drawn, Estimate
from sixfold.evaluation.references import References


class Moments(NamedTuple):
    """Mean and unbiased covariance of features, in float64."""

    mean: Float64[Tensor, " d"]
    covariance: Float64[Tensor, "d d"]


def moments(features: Float[Tensor, "n d"], weights: Float64[Tensor, " n"] | None = None) -> Moments:
    """Fit a Gaussian to at least two feature vectors, each counted ``weights`` times (once by default)."""
    assert len(features) >= 2, f"a covariance needs two samples, got {len(features)}"
    wide = features.double()
    if weights is None:
        mean = wide.mean(0)
        centred = wide - mean
        return Moments(mean, centred.T @ centred / (len(wide) - 1))
    mean = weights @ wide / weights.sum()
    centred = wide - mean
    return Moments(mean, (centred * weights[:, None]).T @ centred / (weights.sum() - 1))


def frechet_distance(first: Moments, second: Moments) -> float:
    """Return |m1 - m2|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2).

    The root's trace is the sum of the roots of the eigenvalues of the symmetric A^1/2 B A^1/2: unlike the root of the
    unsymmetric A B it is real and accurate for singular covariances.
    """
    return _distance(first, _root(first.covariance), second)


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


class FrechetMetric:
    """``fd``, and ``fd_ratio``: its value over the distance between random halves of the training split.

    A ratio of 1 or less is as good as new data, whatever the feature space.
    """

    def __init__(self, config: FrechetConfig, references: References) -> None:
        self._extractor = references.extractor_of(config)
        self.view = self._extractor.identity
        self._resamples = references.resamples
        reference = references.features(self._extractor, "training")
        if reference is None:
            return
        reference.require_covariance()
        self._count = reference.count
        self._reference = Moments(reference.mean, reference.covariance)
        self._root = _root(reference.covariance)
        self._yardstick = (
            half_split_fd(reference.rows, seed=0, splits=config.half_splits) if config.half_splits else 0.0
        )

    def rows(self, drawn: Drawn) -> Float[Tensor, "n d"]:
        """The samples' features."""
        return self._extractor(drawn.images)

    def estimates(self, rows: Float[Tensor, "n d"]) -> list[Estimate]:
        """Return the distance, and its ratio to the yardstick where there is one."""
        value = _distance(self._reference, self._root, moments(rows))
        resampled = [
            _distance(self._reference, self._root, moments(rows, weights.to(rows.device)))
            for weights in resample_weights(len(rows), self._resamples)
        ]
        margin = margin_of(torch.tensor(resampled, dtype=torch.float64))
        scales = {"fd": 1.0} | ({"fd_ratio": self._yardstick} if self._yardstick else {})
        return [
            Estimate(
                name=name,
                value=value / scale,
                margin=None if margin is None else margin / scale,
                better="lower",
                samples=len(rows),
                reference=self._count,
                space=self._extractor.name,
            )
            for name, scale in scales.items()
        ]


def _root(covariance: Float64[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
    """The symmetric square root of a covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    return root


def _distance(first: Moments, root: Float64[Tensor, "d d"], second: Moments) -> float:
    """:func:`frechet_distance` where the root of the first covariance is known already."""
    product = root @ second.covariance @ root
    trace_of_root = torch.linalg.eigvalsh(0.5 * (product + product.T)).clamp(min=0.0).sqrt().sum()
    traces = torch.trace(first.covariance) + torch.trace(second.covariance)
    return float((first.mean - second.mean).square().sum() + traces - 2.0 * trace_of_root)
