"""Where a solver's times lie, from noise to data."""

from __future__ import annotations

from typing import assert_never

import torch
from jaxtyping import Float64
from torch import Tensor

from sixfold.paths.affine import AffinePath
from sixfold.paths.predictions import LARGEST_RATIO_FOR_NOISE
from sixfold.samplers.config import EDMGridConfig, GridConfig, UniformGridConfig


def first_time(path: AffinePath, *, needs_signal: bool) -> Float64[Tensor, ""]:
    """Return where sampling starts: at the path's noisy end, or where a trace of signal is left.

    Predicted noise needs one, and so does a reverse SDE, which drifts infinitely fast where there is none.
    """
    start = torch.tensor(path.time_noise, dtype=torch.float64)
    if not needs_signal:
        return start
    limit = torch.tensor(LARGEST_RATIO_FOR_NOISE, dtype=torch.float64)
    return path.time_at(torch.ones_like(limit), limit)


def solver_times(config: GridConfig, path: AffinePath, steps: int, *, needs_signal: bool) -> Float64[Tensor, " steps"]:
    """Return the falling times at which each step starts; the last one ends at clean data."""
    start = first_time(path, needs_signal=needs_signal)
    match config:
        case UniformGridConfig():
            end = torch.tensor(path.time_data, dtype=torch.float64)
            # a path that ends in clean data is never evaluated there; one that ends in a little noise is
            last = steps if path.coefficients(end).sigma == 0.0 else max(steps - 1, 1)
            fraction = torch.arange(steps, dtype=torch.float64) / last
            return path.shift(start + (end - start) * fraction, config.shift).clamp(max=start.item())
        case EDMGridConfig():
            fraction = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
            large, small = config.sigma_max ** (1 / config.rho), config.sigma_min ** (1 / config.rho)
            ratio = (large + (small - large) * fraction) ** config.rho
            return path.time_at(torch.ones_like(ratio), ratio).clamp(max=start.item())
    assert_never(config)
