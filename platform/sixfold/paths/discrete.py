"""DDPM's discrete noise levels as a path in continuous time (2006.11239)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sixfold.paths.affine import AffinePath, Coefficients
from sixfold.paths.config import VPDiscreteConfig

_LARGEST_COSINE_BETA = 0.999
"""Improved DDPM caps its betas, so that the last step leaves a trace of the data (2102.09672, section 3.2)."""


def betas_of(config: VPDiscreteConfig) -> Float64[Tensor, " steps"]:
    """Return the variance that each step adds, first to last."""
    if config.schedule == "cosine":
        angle = (torch.arange(config.steps + 1, dtype=torch.float64) / config.steps + 0.008) / 1.008 * 0.5 * math.pi
        signal = torch.cos(angle) ** 2
        return (1.0 - signal[1:] / signal[:-1]).clamp(max=_LARGEST_COSINE_BETA)
    root = 0.5 if config.schedule == "scaled_linear" else 1.0
    first, last = config.beta_first**root, config.beta_last**root
    evenly: Tensor = torch.linspace(first, last, config.steps, dtype=torch.float64)
    return evenly ** (1.0 / root)


class VariancePreservingDiscrete(AffinePath):
    """alpha^2 = prod_{i <= k} (1 - beta_i) at t = k / N, and between steps what a constant noise rate makes of it.

    The rate is -N ln(1 - beta_k) within step k: a variance-preserving SDE that passes through DDPM's levels exactly,
    so that continuous solvers, shifts and time distributions apply to it like to any path.
    """

    def __init__(self, config: VPDiscreteConfig) -> None:
        self.steps = config.steps
        spent = -torch.log1p(-betas_of(config)).cumsum(0)
        self.integral = torch.cat([torch.zeros(1, dtype=torch.float64), spent])
        """B at k / N: -ln alpha^2."""

    def coefficients(self, time: Float[Tensor, "..."]) -> Coefficients:
        """alpha = exp(-B / 2), sigma = sqrt(1 - alpha^2); rates as on the linear path, infinite at t=0 for sigma."""
        table = self.integral.to(time.device)
        place = time.double() * self.steps
        step = place.floor().long().clamp(0, self.steps - 1)
        rate = table[step + 1] - table[step]
        half = 0.5 * (table[step] + (place - step) * rate)
        alpha, sigma = torch.exp(-half), torch.sqrt(-torch.expm1(-2.0 * half))
        half_rate = 0.5 * self.steps * rate
        values = (alpha, sigma, -half_rate * alpha, half_rate * alpha**2 / sigma)
        return Coefficients(*(value.to(time.dtype) for value in values))

    def _time_at(self, alpha: Float[Tensor, "..."], sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        table = self.integral.to(alpha.device)
        spent = torch.log1p((sigma.double() / alpha.double()) ** 2)
        step = (torch.searchsorted(table, spent.contiguous(), right=True) - 1).clamp(0, self.steps - 1)
        place = step + (spent - table[step]) / (table[step + 1] - table[step])
        return (place.clamp(max=float(self.steps)) / self.steps).to(alpha.dtype)
