"""Euler's and Heun's methods on the probability-flow ODE, written once for every affine path and prediction.

With x = alpha x0 + sigma e, the ODE reads dx = x0hat(x, t) d(alpha) + ehat(x, t) d(sigma), an integral over the
path's own two coordinates. Discretised in that form, Euler's method is the usual one on rectified flow and EDM and is
DDIM (2010.02502, eq. 12) on variance-preserving paths; Heun's is the trapezoid rule (2206.00364, algorithm 1). No
time derivative of the path is needed, so infinite ones do no harm.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sixfold.samplers.config import EulerConfig, HeunConfig
from sixfold.samplers.denoising import DenoisingSampler, Knots, NoiseSource, PredictEndpoints, everywhere


def solve(
    predict: PredictEndpoints, knots: Knots, x: Float[Tensor, "n ..."], *, second_order: bool
) -> Float[Tensor, "n ..."]:
    """Integrate the probability-flow ODE from ``x`` at the first knot to clean data.

    The last step is always Euler's: data predictions say nothing of the noise where there is none, and a single
    first-order step of size h adds an error of O(h^2), which leaves Heun's order at two. (Not so for evenly spaced
    times on a variance-preserving path: sigma leaves 0 like sqrt(t), the last step is as long as 1/sqrt(steps) in
    sigma, and the order is near one. The EDM grid restores it.)
    """
    times, alphas, sigmas = knots
    for step, start in enumerate(times):
        alpha_change, sigma_change = alphas[step + 1] - alphas[step], sigmas[step + 1] - sigmas[step]
        here = predict(x, everywhere(start, x))
        change = alpha_change * here.data + sigma_change * here.noise
        if second_order and step + 1 < len(times):
            there = predict(x + change, everywhere(times[step + 1], x))
            change = 0.5 * (change + alpha_change * there.data + sigma_change * there.noise)
        x = x + change
    return x


class FlowSampler(DenoisingSampler):
    """Euler's or Heun's method."""

    config: EulerConfig | HeunConfig

    def integrate(self, predict: PredictEndpoints, noise: NoiseSource, steps: int | None) -> Float[Tensor, "n ..."]:
        """Return clean samples after the configured number of steps, or ``steps``."""
        knots = self.knots(steps)
        start = knots.sigmas[0] * noise("noise")
        return solve(predict, knots, start, second_order=isinstance(self.config, HeunConfig))
