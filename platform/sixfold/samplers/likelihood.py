"""The likelihood that a denoiser's probability flow gives to data (2011.13456, section 4.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sixfold.distributed.randomness import PositionRandom
from sixfold.objectives.contract import Networks
from sixfold.objectives.denoising.config import DenoisingConfig
from sixfold.samplers.adaptive import RK45Sampler, State, flow_field, integrate
from sixfold.samplers.config import RK45Config
from sixfold.samplers.contract import SampleRequest


class Likelihood:
    """ln p(x) by carrying x to noise along the ODE: d ln p(y(u)) / du = -div f, for the field f of y alone.

    The divergence is an exact trace in up to ``exact_dimensions`` dimensions; beyond, it is v . (df/dy) v for random
    signs v, one draw a sample for the whole way, which is right on average (Hutchinson's estimator). Derivatives are
    forward mode: no graph is kept, and sharded networks see plain forward passes.
    """

    def __init__(
        self,
        objective: DenoisingConfig,
        networks_config: Mapping[str, Any],
        *,
        solver: RK45Config,
        exact_dimensions: int,
        probes: int,
    ) -> None:
        self.sampler = RK45Sampler(solver, objective, networks_config)
        self.dimensions = math.prod(self.sampler.shape)
        self.exact = self.dimensions <= exact_dimensions
        self.probes = probes

    @torch.no_grad()
    def __call__(
        self, nets: Networks, x: Float[Tensor, "n ..."], conditions: Mapping[str, Tensor], random: PositionRandom
    ) -> Float[Tensor, " n"]:
        """Return ln p(x | conditions) in nats; the prior is N(0, sigma^2 I) at the path's noisy end."""
        solver, d = self.sampler.config, self.dimensions
        request = SampleRequest(seed=random.seed, numbers=random.positions, conditions=conditions)
        field = flow_field(self.sampler.beliefs(nets, request), self.sampler.path)
        divergence = self._exact(field) if self.exact else self._estimated(field, random, x.shape[1:])

        def both(state: State, u: Tensor) -> State:
            slope, trace = divergence(state[0], u)
            return slope, trace / d

        near_data, near_noise = self.sampler.interval()
        shrink = math.cos(near_data)  # what is left of the data in y where the way begins
        with sdpa_kernel(SDPBackend.MATH):  # the others have no forward-mode derivative
            y, gained = integrate(
                both,
                (shrink * x, torch.zeros(len(x), dtype=x.dtype, device=x.device)),
                near_data,
                near_noise,
                rtol=solver.rtol,
                atol=solver.atol,
                max_steps=solver.max_steps,
            )
        prior_std = math.sin(near_noise)  # of y
        squares = (y / prior_std).flatten(1).square().sum(1)
        prior = -0.5 * squares - d * (0.5 * math.log(2.0 * math.pi) + math.log(prior_std))
        return prior + d * (gained + math.log(shrink))

    def _exact(self, field: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], State]:
        def divergence(y: Tensor, u: Tensor) -> State:
            trace = torch.zeros(len(y), dtype=y.dtype, device=y.device)
            for direction in torch.eye(self.dimensions, dtype=y.dtype, device=y.device):
                slope, along = _jvp(field, y, u, direction.reshape(y.shape[1:]).expand_as(y))
                trace = trace + along.flatten(1) @ direction
            return slope, trace

        return divergence

    def _estimated(
        self, field: Callable[[Tensor, Tensor], Tensor], random: PositionRandom, shape: torch.Size
    ) -> Callable[[Tensor, Tensor], State]:
        signs = [
            torch.where(random.uniform(f"likelihood/probe/{probe}", shape) < 0.5, -1.0, 1.0)
            for probe in range(self.probes)
        ]

        def divergence(y: Tensor, u: Tensor) -> State:
            estimates = []
            for sign in signs:
                slope, along = _jvp(field, y, u, sign)
                estimates.append((along * sign).flatten(1).sum(1))
            return slope, torch.stack(estimates).mean(0)

        return divergence


def _jvp(field: Callable[[Tensor, Tensor], Tensor], y: Tensor, u: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    pair = torch.func.jvp(lambda value: field(value, u), (y,), (tangent,))
    return pair[0], pair[1]
