"""DPM-Solver++ (2M), a multistep solver in the logarithm of the signal-to-noise ratio (Lu et al., 2211.01095)."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from sixfold.samplers.config import DPMSolverConfig
from sixfold.samplers.denoising import DenoisingSampler, Knots, NoiseSource, PredictEndpoints, everywhere


def solve_dpm_2m(predict: PredictEndpoints, knots: Knots, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    """Integrate from ``x`` at the first knot to clean data by algorithm 2 of 2211.01095.

    With lambda = ln(alpha / sigma) and a step of h in it, the ODE is solved exactly but for D = x0hat, which is
    extrapolated linearly from the last two evaluations to the middle of the step:

        x' = (sigma' / sigma) x + alpha' (1 - exp(-h)) D,   D = x0hat + h / (2 h_before) (x0hat - x0hat_before).

    exp(-h) is a ratio of the path's own coordinates, hence finite where lambda is not: at pure noise and at clean data.
    The first step has nothing to extrapolate from, and the last, infinitely long in lambda, is not extrapolated.
    """
    times, alphas, sigmas = knots
    before, decay_before = None, 0.0
    for step, start in enumerate(times):
        alpha, sigma, next_alpha, next_sigma = alphas[step], sigmas[step], alphas[step + 1], sigmas[step + 1]
        data = predict(x, everywhere(start, x)).data
        decay = (next_sigma * alpha) / (next_alpha * sigma)
        extrapolated = data
        if before is not None and decay > 0.0 and decay_before > 0.0:
            extrapolated = data + 0.5 * (math.log(decay) / math.log(decay_before)) * (data - before)
        x = (next_sigma / sigma) * x + next_alpha * (1.0 - decay) * extrapolated
        before, decay_before = data, decay
    return x


class DPMSolverSampler(DenoisingSampler):
    """DPM-Solver++ of second order."""

    config: DPMSolverConfig

    def integrate(self, predict: PredictEndpoints, noise: NoiseSource, steps: int | None) -> Float[Tensor, "n ..."]:
        """Return clean samples after the configured number of steps, or ``steps``."""
        knots = self.knots(steps)
        return solve_dpm_2m(predict, knots, knots.sigmas[0] * noise("noise"))
