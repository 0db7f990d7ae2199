"""Samplers that replace part of the noise at every step: DDIM with eta, and ancestral sampling.

Given x0, a step from noise-to-signal ratio r to r' < r has the posterior q(x' | x, x0), normal with variance
sigma'^2 (1 - (r' / r)^2) around a mean in which the rest of x' 's noise points along ehat. Drawing from it is ancestral
sampling (DDPM, 2006.11239, eq. 6); DDIM (2010.02502, eq. 12) draws with eta times that standard deviation. Both hold on
every affine path; on a variance-exploding one they are the "Euler ancestral" step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from sixfold.samplers.config import AncestralConfig, DDIMConfig
from sixfold.samplers.denoising import DenoisingSampler, Knots, NoiseSource, PredictEndpoints, everywhere

DrawNoise = Callable[[str], Tensor]
"""``purpose -> `` standard normal noise; see :class:`~sixfold.samplers.denoising.NoiseSource`."""


def solve_ddim(
    predict: PredictEndpoints, knots: Knots, x: Float[Tensor, "n ..."], noise: DrawNoise, *, eta: float
) -> Float[Tensor, "n ..."]:
    """Return clean samples: x' = alpha' x0hat + sqrt(sigma'^2 - s^2) ehat + s z with s = eta times the posterior's."""
    times, alphas, sigmas = knots
    for step, start in enumerate(times):
        believed = predict(x, everywhere(start, x))
        new = eta * _posterior_std(knots, step)
        kept = math.sqrt(sigmas[step + 1] ** 2 - new**2)
        x = alphas[step + 1] * believed.data + kept * believed.noise
        if new > 0.0:
            x = x + new * noise(f"step/{step}")
    return x


def solve_ancestral(
    predict: PredictEndpoints, knots: Knots, x: Float[Tensor, "n ..."], noise: DrawNoise, *, forward_variance: bool
) -> Float[Tensor, "n ..."]:
    """Return clean samples: the posterior's mean plus noise of its variance, or of the forward step's.

    The mean is alpha'(1 - (r'/r)^2) x0hat + (r'/r) (sigma'/sigma) x; the forward step's variance,
    sigma^2 - (alpha/alpha')^2 sigma'^2, is the right one for data that are standard normal (2006.11239, section 3.2).
    The last step adds none.
    """
    times, alphas, sigmas = knots
    for step, start in enumerate(times):
        data = predict(x, everywhere(start, x)).data
        alpha, sigma, next_alpha, next_sigma = alphas[step], sigmas[step], alphas[step + 1], sigmas[step + 1]
        shrink = (next_sigma * alpha) / (next_alpha * sigma)
        x = next_alpha * (1.0 - shrink**2) * data + shrink * (next_sigma / sigma) * x
        if next_sigma > 0.0:
            forward = math.sqrt(sigma**2 - (alpha / next_alpha * next_sigma) ** 2)
            x = x + (forward if forward_variance else _posterior_std(knots, step)) * noise(f"step/{step}")
    return x


def _posterior_std(knots: Knots, step: int) -> float:
    shrink = (knots.sigmas[step + 1] * knots.alphas[step]) / (knots.alphas[step + 1] * knots.sigmas[step])
    return knots.sigmas[step + 1] * math.sqrt(1.0 - shrink**2)


class StochasticSampler(DenoisingSampler):
    """DDIM or ancestral sampling."""

    config: DDIMConfig | AncestralConfig

    def integrate(self, predict: PredictEndpoints, noise: NoiseSource, steps: int | None) -> Float[Tensor, "n ..."]:
        """Return clean samples after the configured number of steps, or ``steps``."""
        knots = self.knots(steps)
        start = knots.sigmas[0] * noise("noise")
        if isinstance(self.config, DDIMConfig):
            return solve_ddim(predict, knots, start, noise, eta=self.config.eta)
        return solve_ancestral(predict, knots, start, noise, forward_variance=self.config.variance == "forward")
