"""Confidence intervals by resampling the drawn samples with replacement (Efron, 1979).

A resample is a vector of weights, how often each sample occurs in it, so that kernel sums and moments serve all
resamples at once. The interval is centred on the estimate and 1.96 standard deviations of its resampled values wide on
each side: distances are biased upwards by sampling, resampling adds that bias once more, and percentiles would not
cover the estimate itself. The reference is held fixed, for it is part of the metric's definition.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

_TWO_SIDED_95_PERCENT = 1.96


def resample_weights(count: int, resamples: int, *, seed: int = 0) -> Float64[Tensor, "b n"]:
    """Return how often each of ``count`` samples occurs in each resample: rows sum to ``count``."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(count, (resamples, count), generator=generator)
    weights = torch.zeros(resamples, count, dtype=torch.float64)
    return weights.scatter_add_(1, chosen, torch.ones_like(weights))


def margin_of(resampled: Float[Tensor, " b"]) -> float | None:
    """Half the width of the 95% interval from an estimate's values on resamples; None for fewer than two."""
    return None if len(resampled) < 2 else _TWO_SIDED_95_PERCENT * float(resampled.double().std())


def mean_margin(values: Float[Tensor, " n"], resamples: int) -> float | None:
    """Half the width of the 95% interval of the mean of independent values."""
    return margin_of(resample_weights(len(values), resamples) @ values.double().cpu() / len(values))
