"""Distributions of training times, each as the inverse of its distribution function.

Training feeds uniform random numbers, evaluation an evenly spread sequence: the same map makes the second stratified.
"""

from __future__ import annotations

import math
from typing import assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from sixfold.paths.affine import AffinePath
from sixfold.paths.config import (
    DiscreteTimeConfig,
    LogitNormalTimeConfig,
    LogNormalTimeConfig,
    ModeTimeConfig,
    TimeConfig,
    UniformTimeConfig,
)


def time_at_quantile(config: TimeConfig, path: AffinePath, quantile: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Map quantiles in (0, 1) to path times, monotonically: little noise first."""
    match config:
        case LogNormalTimeConfig():
            ratio = torch.exp(config.mean + config.std * torch.special.ndtri(quantile))
            return path.time_at(torch.ones_like(ratio), config.shift * ratio)
        case UniformTimeConfig():
            fraction = quantile
        case DiscreteTimeConfig():
            fraction = (torch.ceil(quantile * config.steps) / config.steps).clamp(min=1.0 / config.steps)
        case LogitNormalTimeConfig():
            fraction = torch.sigmoid(config.mean + config.std * torch.special.ndtri(quantile))
        case ModeTimeConfig():
            fraction = quantile - config.scale * (torch.sin(0.5 * math.pi * quantile) ** 2 - quantile)
        case _:
            assert_never(config)
    return path.shift(path.time_at_fraction(fraction), config.shift)
