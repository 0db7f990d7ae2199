"""Squared maximum mean discrepancies between features: KID (1801.01401) and CMMD (2401.09603).

Both are the unbiased U-statistic: its expectation does not depend on the numbers of samples, is 0 for equal
distributions, and the estimate itself may be negative.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sixfold.evaluation.bootstrap import margin_of, resample_weights
from sixfold.evaluation.config import CMMDConfig, KernelInceptionConfig
from sixfold.evaluation.contract import Drawn, Estimate
from sixfold.evaluation.pairs import squared_distances
from sixfold.evaluation.references import References

Kernel = Callable[[Float64[Tensor, "n d"], Float64[Tensor, "m d"]], Float64[Tensor, "n m"]]

CMMD_SCALE = 1000.0
"""CMMD is reported times this."""


def cubic_kernel(first: Float64[Tensor, "n d"], second: Float64[Tensor, "m d"]) -> Float64[Tensor, "n m"]:
    """(x.y / d + 1)^3, KID's kernel."""
    return (first @ second.T / first.shape[1] + 1.0).pow(3)


def gaussian_kernel(bandwidth: float) -> Kernel:
    """exp(-|x - y|^2 / (2 sigma^2)), CMMD's kernel with sigma 10."""

    def kernel(first: Float64[Tensor, "n d"], second: Float64[Tensor, "m d"]) -> Float64[Tensor, "n m"]:
        return torch.exp(-squared_distances(first, second).clamp(min=0.0) / (2.0 * bandwidth**2))

    return kernel


def kernel_distance(
    first: Float[Tensor, "n d"], second: Float[Tensor, "m d"], *, kernel: Kernel = cubic_kernel, block: int = 4096
) -> float:
    """Return the unbiased estimate of the squared MMD over all pairs; at least two samples of each."""
    assert len(second) >= 2, "the unbiased estimate needs two samples of each"
    once = torch.ones(1, len(first), dtype=torch.float64, device=first.device)
    within = within_second(second.double(), kernel, block)
    return float(weighted_distances(first.double(), once, second.double(), within, kernel, block)[0])


def within_second(features: Float64[Tensor, "m d"], kernel: Kernel, block: int = 4096) -> float:
    """Return the mean kernel over pairs of different features."""
    once = torch.ones(1, len(features), dtype=torch.float64, device=features.device)
    return float(_within(features, once, kernel, block)[0])


def weighted_distances(
    first: Float64[Tensor, "n d"],
    weights: Float64[Tensor, "b n"],
    second: Float64[Tensor, "m d"],
    within: float,
    kernel: Kernel,
    block: int = 4096,
) -> Float64[Tensor, " b"]:
    """Return the squared MMD for each way of counting the first set's features.

    Args:
        first: the features that are counted, at least two.
        weights: how often each counts; a feature's pairs with its own copies are left out, as in the estimate itself.
        second: the other set.
        within: the other set's own mean kernel, :func:`within_second`.
        kernel: of two sets, every pair.
        block: rows of the kernel matrix held at once.
    """
    assert len(first) >= 2, "the unbiased estimate needs two samples of each"
    between = torch.cat([kernel(rows, second).mean(1) for rows in torch.split(first, block)])
    return _within(first, weights, kernel, block) + within - 2.0 * weights @ between / weights.sum(1)


def _within(
    features: Float64[Tensor, "n d"], weights: Float64[Tensor, "b n"], kernel: Kernel, block: int
) -> Float64[Tensor, " b"]:
    """Return the weighted mean kernel over pairs of different features."""
    total = torch.zeros(len(weights), dtype=torch.float64, device=features.device)
    start = 0
    for rows in torch.split(features, block):
        values = kernel(rows, features)
        end = start + len(rows)
        values[torch.arange(len(rows)), torch.arange(start, end)] = 0.0
        total += ((values @ weights.T) * weights[:, start:end].T).sum(0)
        start = end
    return total / (weights.sum(1).square() - weights.square().sum(1))


class KernelMetric:
    """``kid`` or ``cmmd``."""

    def __init__(self, config: KernelInceptionConfig | CMMDConfig, references: References) -> None:
        self._name = config.type
        gaussian = isinstance(config, CMMDConfig)
        self._kernel = gaussian_kernel(config.bandwidth) if isinstance(config, CMMDConfig) else cubic_kernel
        self._scale = CMMD_SCALE if gaussian else 1.0
        self._resamples = references.resamples
        self._extractor = references.extractor_of(config)
        self.view = self._extractor.identity
        reference = references.features(self._extractor, "training")
        if reference is not None:
            self._reference = reference.rows.double()
            self._within = within_second(self._reference, self._kernel)

    def rows(self, drawn: Drawn) -> Float[Tensor, "n d"]:
        """The samples' features."""
        return self._extractor(drawn.images)

    def estimates(self, rows: Float[Tensor, "n d"]) -> list[Estimate]:
        """Return the distance."""
        ways = torch.cat([torch.ones(1, len(rows), dtype=torch.float64), resample_weights(len(rows), self._resamples)])
        values = self._scale * weighted_distances(
            rows.double(), ways.to(rows.device), self._reference, self._within, self._kernel
        )
        return [
            Estimate(
                name=self._name,
                value=float(values[0]),
                margin=margin_of(values[1:]),
                better="lower",
                samples=len(rows),
                reference=len(self._reference),
                space=self._extractor.name,
            )
        ]
