"""Solvers of the probability-flow ODE, written once for every affine path and prediction.

With x = alpha x0 + sigma e, the ODE reads dx = x0hat(x, t) d(alpha) + ehat(x, t) d(sigma), an integral over the
path's own two coordinates. Discretised in that form, Euler's method is the usual one on rectified flow and EDM and is
DDIM (2010.02502, eq. 12) on variance-preserving paths; Heun's is the trapezoid rule (2206.00364, algorithm 1). No
time derivative of the path is needed, so infinite ones do no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sixfold.distributed.randomness import PositionRandom
from sixfold.errors import RecipeError, UserError
from sixfold.objectives.contract import Networks
from sixfold.objectives.denoising.config import DenoisingConfig
from sixfold.objectives.denoising.objective import denoiser_config
from sixfold.paths.affine import AffinePath
from sixfold.paths.predictions import Endpoints, endpoints_of, network_input
from sixfold.samplers.config import CFGConfig, EulerConfig, HeunConfig
from sixfold.samplers.contract import SampleRequest
from sixfold.samplers.grids import solver_times
from sixfold.samplers.guidance import guided, guides_at

PredictEndpoints = Callable[[Tensor, float], Endpoints]
"""``(x [n, ...], path time) -> `` what the data and the noise in x are believed to be."""


def solve(
    predict: PredictEndpoints,
    path: AffinePath,
    x: Float[Tensor, "n ..."],
    times: Float64[Tensor, " steps"],
    *,
    second_order: bool,
) -> Float[Tensor, "n ..."]:
    """Integrate the probability-flow ODE from ``x`` at the first of ``times`` (falling) to clean data.

    The last step is always Euler's: data predictions say nothing of the noise where there is none, and a single
    first-order step of size h adds an error of O(h^2), which leaves Heun's order at two. (Not so for evenly spaced
    times on a variance-preserving path: sigma leaves 0 like sqrt(t), the last step is as long as 1/sqrt(steps) in
    sigma, and the order is near one. The EDM grid restores it.)
    """
    knots = path.coefficients(times)
    alphas, sigmas, starts = [*knots.alpha.tolist(), 1.0], [*knots.sigma.tolist(), 0.0], times.tolist()
    for step, start in enumerate(starts):
        alpha_change, sigma_change = alphas[step + 1] - alphas[step], sigmas[step + 1] - sigmas[step]
        here = predict(x, start)
        change = alpha_change * here.data + sigma_change * here.noise
        if second_order and step + 1 < len(starts):
            there = predict(x + change, starts[step + 1])
            change = 0.5 * (change + alpha_change * there.data + sigma_change * there.noise)
        x = x + change
    return x


class FlowSampler:
    """Euler's or Heun's method from noise, keyed by (seed, sample number), to images."""

    def __init__(
        self,
        config: EulerConfig | HeunConfig,
        objective: DenoisingConfig,
        networks_config: Mapping[str, object],
    ) -> None:
        self.config, self.objective = config, objective
        self.path: AffinePath = objective.path.load()(objective.path)
        network = denoiser_config(networks_config, objective.network)
        self.shape = (network.channels, network.image_size, network.image_size)
        self.null_values = network.null_values
        if isinstance(config.guidance, CFGConfig) and not self.null_values:
            raise RecipeError.of(
                f"classifier-free guidance needs conditions, and network {objective.network!r} has none",
                where="sampling.guidance",
                fix="make the network conditional (for a DiT: classes) or set sampling.guidance.type=none",
            )

    @torch.no_grad()
    def __call__(self, nets: Networks, request: SampleRequest) -> Mapping[str, Tensor]:
        """Return ``image`` ``[n, channels, height, width]`` in [-1, 1]; a condition not given counts as absent."""
        condition, null = self._conditions(request)
        kind, data_std, guidance = self.objective.prediction, self.objective.data_std, self.config.guidance

        def predict(x: Tensor, start: float) -> Endpoints:
            time = torch.full((len(x),), start, dtype=x.dtype, device=x.device)
            at = self.path.coefficients(time)
            seen, seen_time = network_input(x, time, at, kind, data_std)
            if isinstance(guidance, CFGConfig) and guides_at(guidance, start):
                value = guided(nets["denoiser"], seen, seen_time, condition, null, guidance.scale)
            else:
                value = nets["denoiser"](seen, seen_time, condition).float()
            return endpoints_of(value, kind, x, at, data_std)

        times = solver_times(self.config.grid, self.path, kind, request.steps or self.config.steps)
        noise = PositionRandom(request.seed, request.numbers).normal("sampling/noise", self.shape)
        x = self.path.coefficients(times[0]).sigma.item() * noise
        image = solve(predict, self.path, x, times, second_order=isinstance(self.config, HeunConfig))
        return {"image": image.clamp(-1.0, 1.0)}

    def _conditions(self, request: SampleRequest) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the requested conditions, filled up with null values, and the null conditions."""
        unknown = sorted(set(request.conditions) - set(self.null_values))
        if unknown:
            raise UserError.of(
                f"network {self.objective.network!r} has no condition {', '.join(unknown)}",
                allowed=", ".join(self.null_values) or "none: it is unconditional",
                fix="leave the condition out",
            )
        null = {name: torch.full_like(request.numbers, value) for name, value in self.null_values.items()}
        return {**null, **request.conditions}, null
