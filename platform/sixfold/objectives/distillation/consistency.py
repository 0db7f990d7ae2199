"""Consistency models, distilled or trained alone: f(x_t, t) = f(x_r, r) along every trajectory, and f(x, 0) = x.

f is the student's belief about where the trajectory ends, a x0hat + s ehat with the path's (a, s) at its clean end.
Networks that predict a velocity, v, or EDM's F meet the boundary condition by themselves: what they imply at that end
is x itself, whatever they say. Where no noise is left there, f is the belief about the data. On EDM's path, which ends
at s_min, it is c_skip x + c_out F with c_out = sd (s - s_min) / sqrt(s^2 + sd^2), that of 2303.01469 (appendix C), and
c_skip = (sd^2 + s s_min) / (s^2 + sd^2) where the paper has sd^2 / ((s - s_min)^2 + sd^2): both are 1 at s_min, and
agree where s_min is little.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sixfold.distributed.randomness import PositionRandom
from sixfold.objectives.contract import Networks, Phase, Role
from sixfold.objectives.distillation.common import (
    Drawn,
    FewStepObjective,
    PerSample,
    require_boundary_condition,
    require_scalar,
)
from sixfold.objectives.distillation.consistency_config import (
    ConsistencyConfig,
    GridPairsConfig,
    PairsConfig,
)
from sixfold.objectives.distillation.view import Condition, on_path
from sixfold.paths.affine import AffinePath, Coefficients
from sixfold.paths.predictions import Endpoints
from sixfold.paths.times import time_at_quantile

GUIDANCE = "guidance"
"""The condition by which a student is told the scale of its teacher's guidance."""

_LARGEST_RATIO = 1e4
"""Noise-to-signal ratio that stands for pure noise where ratios are compared."""


class Pair(NamedTuple):
    """Two times of the student's path, the noisier first."""

    noisy: Float[Tensor, " n"]
    clean: Float[Tensor, " n"]


class Consistency(FewStepObjective):
    """d(f(x_t, t), f_target(x_r, r)), where x_r lies on the trajectory through x_t."""

    config: ConsistencyConfig

    def __init__(self, config: ConsistencyConfig, networks_config: Mapping[str, Any]) -> None:
        super().__init__(config, networks_config)
        require_boundary_condition(self.student)
        if config.embed_guidance is not None:
            require_scalar(config, networks_config, GUIDANCE, "objective.embed_guidance tells the student a scale")
        if config.target_decay is not None:
            target = Role(kind="tracking", network=config.network, follows="denoiser", decay=config.target_decay)
            self.roles = {**self.roles, "target": target}

    def loss(self, nets: Networks, drawn: Drawn, phase: Phase, random: PositionRandom) -> PerSample:
        """Return the distance between what each pair leads to."""
        pair = pair_at(self.config.pairs, self.student.path, drawn.quantile, phase.done)
        noisy, clean = (self.student.path.coefficients(time) for time in pair)
        scale, condition = self._guidance(drawn, random)
        ends = Endpoints(drawn.data, drawn.noise)
        x = on_path(ends, noisy.alpha, noisy.sigma)
        found = self.lead_to(nets["denoiser"], x, noisy, condition)
        with torch.no_grad():
            taught = self.teacher is not None
            nearer = self._solve(nets, x, noisy, clean, drawn, scale) if taught else on_path(ends, *clean[:2])
            network = nets["denoiser" if self.config.target_decay is None else "target"]
            target = self.lead_to(network, nearer, clean, condition)
        distance = self._distance(found, target)
        gap = (pair.noisy - pair.clean).to(distance)
        weight = 1.0 / gap if self.config.weighting == "inverse_gap" else 1.0
        return PerSample(weight * distance, {"distance": distance})

    def lead_to(
        self, network: Any, x: Float[Tensor, "n ..."], at: Coefficients, condition: Condition
    ) -> Float[Tensor, "n ..."]:
        """Return f(x, t): where the student believes that the trajectory through ``x`` ends."""
        path = self.student.path
        end = path.coefficients(torch.full_like(at.alpha, path.time_data))
        ends = self.student(network, x, at.alpha, at.sigma, condition)
        return on_path(ends, end.alpha, end.sigma)

    def _solve(
        self,
        nets: Networks,
        x: Float[Tensor, "n ..."],
        start: Coefficients,
        stop: Coefficients,
        drawn: Drawn,
        scale: float | Float[Tensor, " n"],
    ) -> Float[Tensor, "n ..."]:
        """Follow the teacher's probability flow from one time to another: dx = x0hat d(alpha) + ehat d(sigma)."""
        change = [(b - a).to(x).reshape(-1, *[1] * (x.ndim - 1)) for a, b in zip(start[:2], stop[:2], strict=True)]
        here = self.teach(nets, x, start.alpha, start.sigma, drawn, scale)
        step = change[0] * here.data + change[1] * here.noise
        if self.config.solver == "heun":
            there = self.teach(nets, x + step, stop.alpha, stop.sigma, drawn, scale)
            second = 0.5 * (step + change[0] * there.data + change[1] * there.noise)
            # Where no noise is left beliefs about it mean nothing: there Euler's step ends at the data it believes in.
            step = torch.where(stop.sigma.reshape(change[0].shape) > 0, second, step)
        return x + step

    def _guidance(self, drawn: Drawn, random: PositionRandom) -> tuple[float | Tensor, Mapping[str, Tensor]]:
        """Return the teacher's scale, and the condition that tells the student of it where it varies."""
        span = self.config.embed_guidance
        if span is None:
            return self.config.teacher_guidance, drawn.condition
        scale = span[0] + (span[1] - span[0]) * random.uniform("distillation/guidance")
        return scale, {**drawn.condition, GUIDANCE: scale}

    def _distance(self, found: Float[Tensor, "n ..."], target: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
        """Squared error, a mean over dimensions; pseudo-Huber (2310.14189, eq. 7); or Cauchy's (2502.01441)."""
        square = (found - target).square().flatten(1)
        dims = square.shape[1]
        if self.config.cauchy is not None:
            return torch.log1p(square.sum(1) / (2.0 * dims * self.config.cauchy**2))
        if self.config.huber is None:
            return square.mean(1)
        if self.config.elementwise:
            return (torch.sqrt(square + self.config.huber**2) - self.config.huber).mean(1)
        offset = self.config.huber * math.sqrt(dims)
        return torch.sqrt(square.sum(1) + offset**2) - offset


def pair_at(config: PairsConfig, path: AffinePath, quantile: Float[Tensor, " n"], done: float) -> Pair:
    """Return the pair of times at a quantile in (0, 1), when the fraction ``done`` of training is over."""
    if isinstance(config, GridPairsConfig):
        return _grid_pair(config, path, quantile, done)
    noisy = time_at_quantile(config.time, path, quantile)
    at = path.coefficients(noisy)
    ratio = (at.sigma / at.alpha).clamp(max=_LARGEST_RATIO)
    gap = config.factor ** -(math.floor(done * config.stages) + 1.0)
    nearer = (ratio - ratio * gap * (1.0 + config.boost * torch.sigmoid(-ratio))).clamp(min=0.0)
    return Pair(noisy, path.time_at(torch.ones_like(nearer), nearer))


def grid_steps(config: GridPairsConfig, done: float) -> int:
    """Return the grid's intervals: doubled at even distances until ``last_steps`` (2310.14189, eq. 6)."""
    doublings = math.ceil(math.log2(config.last_steps / config.first_steps))
    steps: int = config.first_steps << math.floor(done * (doublings + 1))
    return min(steps, config.last_steps)


def _grid_pair(config: GridPairsConfig, path: AffinePath, quantile: Float[Tensor, " n"], done: float) -> Pair:
    steps = grid_steps(config, done)
    root = 1.0 / config.rho
    low, high = path.time_data**root, path.time_noise**root
    knots = (low + (high - low) * torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)) ** config.rho
    knots = knots.to(quantile)
    if config.normal is None:
        upper = (quantile * steps).long().clamp(max=steps - 1) + 1
    else:
        upper = _by_normal(config.normal, path, knots, quantile)
    return Pair(knots[upper], knots[upper - 1])


def _by_normal(
    normal: tuple[float, float], path: AffinePath, knots: Float[Tensor, " knots"], quantile: Float[Tensor, " n"]
) -> Tensor:
    """Draw an interval by the normal probability of ln(ratio) within it (2310.14189, eq. 8)."""
    at = path.coefficients(knots)
    logs = torch.log((at.sigma / at.alpha).clamp(1.0 / _LARGEST_RATIO, _LARGEST_RATIO))
    below = torch.special.ndtr((logs - normal[0]) / normal[1])
    share = (below - below[0]) / (below[-1] - below[0])
    return torch.searchsorted(share, quantile).clamp(1, len(knots) - 1)
