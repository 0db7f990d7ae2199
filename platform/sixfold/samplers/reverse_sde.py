"""The reverse-time SDE, by Euler-Maruyama steps and Langevin corrections (Song et al., 2011.13456).

The forward SDE of an affine path has the squared diffusion g^2 = 2 sigma^2 d(ln r)/dt with r = sigma / alpha. Its
reverse adds to the probability flow, over a fall of h in ln r, a drift of sigma^2 h along the score -ehat / sigma and
noise of variance 2 sigma^2 h. Written in h rather than in t, the step is the same on every path and never meets an
infinite rate, but where no signal is left: sampling starts a little below pure noise.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from sixfold.samplers.config import ReverseSDEConfig
from sixfold.samplers.denoising import DenoisingSampler, Knots, NoiseSource, PredictEndpoints, everywhere
from sixfold.samplers.stochastic import DrawNoise


def solve_reverse_sde(
    predict: PredictEndpoints,
    knots: Knots,
    x: Float[Tensor, "n ..."],
    noise: DrawNoise,
    *,
    corrector_steps: int = 0,
    corrector_ratio: float = 0.16,
) -> Float[Tensor, "n ..."]:
    """Return clean samples; the last step is a jump to the data that is believed in, without noise.

    A correction at noise level sigma is a Langevin step x += e s + sqrt(2 e) z with e = 2 (ratio sigma)^2 (algorithms 4
    and 5; sigma stands for their |z| / |s|, which is a statistic of the batch).
    """
    times, alphas, sigmas = knots
    for step, start in enumerate(times[:-1]):
        believed = predict(x, everywhere(start, x))
        alpha, sigma, next_alpha, next_sigma = alphas[step], sigmas[step], alphas[step + 1], sigmas[step + 1]
        fall = math.log((sigma * next_alpha) / (alpha * next_sigma))
        flow = (next_alpha - alpha) * believed.data + (next_sigma - sigma) * believed.noise
        x = x + flow - sigma * fall * believed.noise + sigma * math.sqrt(2.0 * fall) * noise(f"step/{step}")
        for correction in range(corrector_steps):
            towards = predict(x, everywhere(times[step + 1], x)).noise
            size = 2.0 * (corrector_ratio * next_sigma) ** 2
            fresh = noise(f"step/{step}/correction/{correction}")
            x = x - (size / next_sigma) * towards + math.sqrt(2.0 * size) * fresh
    return predict(x, everywhere(times[-1], x)).data


class ReverseSDESampler(DenoisingSampler):
    """Euler-Maruyama, or predictor-corrector, on the reverse-time SDE."""

    config: ReverseSDEConfig
    needs_signal = True

    def integrate(self, predict: PredictEndpoints, noise: NoiseSource, steps: int | None) -> Float[Tensor, "n ..."]:
        """Return clean samples after the configured number of steps, or ``steps``."""
        knots = self.knots(steps)
        return solve_reverse_sde(
            predict,
            knots,
            knots.sigmas[0] * noise("noise"),
            noise,
            corrector_steps=self.config.corrector_steps,
            corrector_ratio=self.config.corrector_ratio,
        )
