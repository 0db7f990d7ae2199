"""Affine probability paths, x_t = alpha(t) x0 + sigma(t) e, from data x0 to standard normal noise e.

A path is two functions of time and their derivatives; DDPM, score SDE, EDM and rectified flow differ in nothing else.
Time grows from data to noise everywhere (t=0 is data and t=1 noise, except for EDM, whose time is the noise level).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sixfold.paths.config import EDMPathConfig, RectifiedFlowConfig, VEConfig, VPCosineConfig, VPLinearConfig

_RHO = 7.0
"""EDM's curvature of noise levels."""


class Coefficients(NamedTuple):
    """The path at given times: x_t = alpha x0 + sigma e and dx_t/dt = alpha_rate x0 + sigma_rate e."""

    alpha: Float[Tensor, "..."]
    sigma: Float[Tensor, "..."]
    alpha_rate: Float[Tensor, "..."]
    sigma_rate: Float[Tensor, "..."]

    def to(self, like: Tensor) -> Coefficients:
        """Return the coefficients in the type, and on the device, of another tensor."""
        return Coefficients(*(value.to(like) for value in self))

    def broadcast(self, like: Float[Tensor, "n ..."]) -> Coefficients:
        """Append singleton dimensions so that coefficients ``[n]`` multiply a tensor ``[n, ...]``."""
        return Coefficients(*(value.reshape(-1, *[1] * (like.ndim - 1)) for value in self))


class AffinePath(ABC):
    """A path over times from ``time_data`` (little or no noise) to ``time_noise`` (little or no signal)."""

    time_data: float = 0.0
    time_noise: float = 1.0

    @abstractmethod
    def coefficients(self, time: Float[Tensor, "..."]) -> Coefficients:
        """Evaluate the path's two functions and their derivatives, in the precision of ``time``."""

    @abstractmethod
    def _time_at(self, alpha: Float[Tensor, "..."], sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Invert sigma(t)/alpha(t); where the ratio lies outside the path's range the value is not used."""

    def time_at(self, alpha: Float[Tensor, "..."], sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the time at which sigma(t) : alpha(t) equals ``sigma : alpha``, clamped to the path's interval.

        The ratio is given as a pair because it is infinite where no signal is left.
        """
        return self._time_at(alpha, sigma).clamp(self.time_data, self.time_noise)

    def time_at_fraction(self, fraction: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the time that lies a fraction of the way from data to noise, as far as denoising it is concerned."""
        return self.time_data + (self.time_noise - self.time_data) * fraction

    def shift(self, time: Float[Tensor, "..."], factor: float) -> Float[Tensor, "..."]:
        """Multiply the noise-to-signal ratio by ``factor``.

        On the rectified path this is t' = a t / (1 + (a - 1) t), the resolution shift of Stable Diffusion 3
        (2403.03206, eq. 23); on a variance-preserving path it moves the log-SNR by -2 ln a (simple diffusion,
        2301.11093).
        """
        if factor == 1.0:
            return time
        at = self.coefficients(time)
        return self.time_at(at.alpha, factor * at.sigma)


class RectifiedFlow(AffinePath):
    """x_t = (1 - t) x0 + t e, with constant velocity e - x0 (2209.03003)."""

    def __init__(self, config: RectifiedFlowConfig) -> None:
        self.config = config

    def coefficients(self, time: Float[Tensor, "..."]) -> Coefficients:
        """alpha = 1 - t, sigma = t."""
        one = torch.ones_like(time)
        return Coefficients(1.0 - time, time, -one, one)

    def _time_at(self, alpha: Float[Tensor, "..."], sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return sigma / (alpha + sigma)


class VariancePreservingLinear(AffinePath):
    """alpha = exp(-B(t)/2), sigma = sqrt(1 - alpha^2), where B integrates a linear rate (2011.13456, eq. 33)."""

    def __init__(self, config: VPLinearConfig) -> None:
        self.beta_min, self.beta_max = config.beta_min, config.beta_max

    def coefficients(self, time: Float[Tensor, "..."]) -> Coefficients:
        """The rates are alpha' = -beta alpha / 2 and sigma' = beta alpha^2 / (2 sigma), infinite at t=0."""
        slope = self.beta_max - self.beta_min
        half_integral = 0.5 * time * (self.beta_min + 0.5 * slope * time)
        half_rate = 0.5 * (self.beta_min + slope * time)
        alpha, sigma = torch.exp(-half_integral), torch.sqrt(-torch.expm1(-2.0 * half_integral))
        return Coefficients(alpha, sigma, -half_rate * alpha, half_rate * alpha**2 / sigma)

    def _time_at(self, alpha: Float[Tensor, "..."], sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Solve B(t)/2 = -ln alpha for the positive root, in the form that does not cancel."""
        slope, half_min = self.beta_max - self.beta_min, 0.5 * self.beta_min
        half_integral = (0.5 * torch.log1p((sigma / alpha) ** 2)).clamp(max=self.beta_max)  # B(1)/2 is always below
        return 2.0 * half_integral / (half_min + torch.sqrt(half_min**2 + slope * half_integral))


class VariancePreservingCosine(AffinePath):
    """alpha proportional to cos of an angle that is linear in time, sigma = sqrt(1 - alpha^2) (2102.09672, eq. 17)."""

    def __init__(self, config: VPCosineConfig) -> None:
        self.offset = config.offset
        self.first_angle = 0.5 * math.pi * self.offset / (1.0 + self.offset)
        self.angle_rate = 0.5 * math.pi / (1.0 + self.offset)

    def coefficients(self, time: Float[Tensor, "..."]) -> Coefficients:
        """1 - alpha^2 as sin(angle - first) sin(angle + first) / cos^2(first), which does not cancel near t=0."""
        turned, scale = self.angle_rate * time, math.cos(self.first_angle)
        angle = turned + self.first_angle
        alpha = torch.cos(angle).clamp(min=0.0) / scale
        sigma = torch.sqrt(torch.sin(turned) * torch.sin(angle + self.first_angle)) / scale
        alpha_rate = -self.angle_rate * torch.sin(angle) / scale
        return Coefficients(alpha, sigma, alpha_rate, -alpha * alpha_rate / sigma)

    def _time_at(self, alpha: Float[Tensor, "..."], sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        cosine = math.cos(self.first_angle) * alpha / torch.hypot(alpha, sigma)
        return (torch.acos(cosine) - self.first_angle) / self.angle_rate


class VarianceExploding(AffinePath):
    """alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t (2011.13456, eq. 31)."""

    def __init__(self, config: VEConfig) -> None:
        self.sigma_min = config.sigma_min
        self.log_ratio = math.log(config.sigma_max / config.sigma_min)

    def coefficients(self, time: Float[Tensor, "..."]) -> Coefficients:
        """sigma' = ln(sigma_max / sigma_min) sigma."""
        sigma = self.sigma_min * torch.exp(self.log_ratio * time)
        return Coefficients(torch.ones_like(time), sigma, torch.zeros_like(time), self.log_ratio * sigma)

    def _time_at(self, alpha: Float[Tensor, "..."], sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return torch.log(sigma / (alpha * self.sigma_min)) / self.log_ratio


class EDM(AffinePath):
    """x_t = x0 + t e: time is the noise level, from sigma_min to sigma_max (2206.00364)."""

    def __init__(self, config: EDMPathConfig) -> None:
        self.time_data, self.time_noise = config.sigma_min, config.sigma_max

    def coefficients(self, time: Float[Tensor, "..."]) -> Coefficients:
        """alpha = 1, sigma = t."""
        one = torch.ones_like(time)
        return Coefficients(one, time, torch.zeros_like(time), one)

    def time_at_fraction(self, fraction: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Evenly in the seventh root (eq. 5): nearly all of the interval itself is noise that hides everything."""
        low, high = (end ** (1.0 / _RHO) for end in (self.time_data, self.time_noise))
        time: Tensor = (low + (high - low) * fraction) ** _RHO
        return time.clamp(self.time_data, self.time_noise)

    def _time_at(self, alpha: Float[Tensor, "..."], sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return sigma / alpha
