"""Continuous-time consistency models on TrigFlow's path x_t = cos(t) x0 + sin(t) z, z = sd e (2410.11081).

The student may know any path: its beliefs about both ends give F = (cos(t) z - sin(t) x0) / sd, the velocity of the
trigonometric path, and f = cos(t) x - sin(t) sd F is its belief about the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sixfold.distributed.randomness import PositionRandom
from sixfold.objectives.contract import Networks, Phase
from sixfold.objectives.distillation.common import Drawn, FewStepObjective, PerSample, require_boundary_condition
from sixfold.objectives.distillation.derivatives import directional_derivative
from sixfold.objectives.distillation.trigflow_config import TrigFlowConsistencyConfig
from sixfold.objectives.distillation.view import View, on_path
from sixfold.paths.predictions import Endpoints
from sixfold.paths.times import time_at_quantile


class TrigFlowConsistency(FewStepObjective):
    """|F - sg(F) - g|^2, a sum over dimensions, with the normalised tangent g of the consistency function."""

    config: TrigFlowConsistencyConfig

    def __init__(self, config: TrigFlowConsistencyConfig, networks_config: Mapping[str, Any]) -> None:
        super().__init__(config, networks_config)
        require_boundary_condition(self.student)

    def loss(self, nets: Networks, drawn: Drawn, phase: Phase, random: PositionRandom) -> PerSample:
        """Return the squared error of each sample (algorithm 1)."""
        data_std = self.student.settings.data_std
        at = self.student.path.coefficients(time_at_quantile(self.config.time, self.student.path, drawn.quantile))
        angle = torch.atan2(at.sigma, data_std * at.alpha)
        alpha, sigma = torch.cos(angle), data_std * torch.sin(angle)
        x = on_path(Endpoints(drawn.data, drawn.noise), alpha, sigma)
        ends = Endpoints(drawn.data, drawn.noise)
        if self.teacher is not None:
            ends = self.teach(nets, x, alpha, sigma, drawn)

        def velocity(x: Tensor, angle: Tensor) -> Tensor:
            return trigonometric_velocity(self.student, nets["denoiser"], x, angle, drawn.condition)

        angle = angle.to(x.dtype)

        with torch.no_grad():
            tangent = self._tangent(velocity, x, angle, velocity_of(ends, angle, data_std), phase.done)
        found = velocity(x, angle)
        # F - sg(F) is zero exactly: between two passes it would be rounding, of the size of what is to be learnt.
        return PerSample((found - found.detach() - tangent).square().flatten(1).sum(1))

    def _tangent(
        self, velocity: Callable[..., Tensor], x: Tensor, angle: Tensor, driven: Tensor, done: float
    ) -> Float[Tensor, "n ..."]:
        """Return g / (|g| + c); ``driven`` is the velocity of the trajectory over sd."""
        data_std = self.student.settings.data_std
        wide = angle.reshape(-1, *[1] * (x.ndim - 1))
        cos, sin = (part.to(x) for part in (torch.cos(wide.double()), torch.sin(wide.double())))
        # cos(t) sin(t) dF/dt as one derivative along scaled directions: near pure noise it stays finite.
        directions = (cos * sin * data_std * driven, (cos * sin).flatten())
        held, change = directional_derivative(velocity, (x, angle), directions)
        faded_in = min(1.0, done / self.config.warmup_fraction) if self.config.warmup_fraction > 0 else 1.0
        tangent = consistency_tangent(
            cos=cos, sin=sin, x=x / data_std, held=held, driven=driven, change=change, faded_in=faded_in
        )
        norm = tangent.flatten(1).norm(dim=1).reshape(wide.shape)
        normalised: Tensor = tangent / (norm + self.config.tangent_offset)
        return normalised


def consistency_tangent(
    *, cos: Tensor, sin: Tensor, x: Tensor, held: Tensor, driven: Tensor, change: Tensor, faded_in: float
) -> Tensor:
    """Return -cos^2 (F - dx/dt) - r cos sin x - r cos sin dF/dt, in units of sd (2410.11081, eq. 8, algorithm 1).

    At r = 1 this is cos(t) df/dt, the rate at which the consistency function changes along the trajectory. Where r < 1
    the paper puts r sin(t) in the place of sin(t) and leaves cos(t) alone (section 4.1, "tangent warmup"), hence cos^2.
    Later work has cos sqrt(1 - r^2 sin^2) there, the cosine that would go with r sin(t); both are the same at r = 1.

    Args:
        cos: cos(t).
        sin: sin(t).
        x: the noisy sample over sd.
        held: F at x.
        driven: dx/dt over sd along the trajectory.
        change: cos sin dF/dt along the trajectory.
        faded_in: r.
    """
    return -cos * cos * (held - driven) - faded_in * (cos * sin * x + change)


def velocity_of(ends: Endpoints, angle: Float[Tensor, " n"], data_std: float) -> Float[Tensor, "n ..."]:
    """Return (cos(t) sd e - sin(t) x0) / sd."""
    return on_path(ends, -torch.sin(angle) / data_std, torch.cos(angle))


def trigonometric_velocity(
    view: View, network: object, x: Float[Tensor, "n ..."], angle: Float[Tensor, " n"], condition: object
) -> Float[Tensor, "n ..."]:
    """Return F at x of TrigFlow's path, from a network of any path and prediction."""
    data_std = view.settings.data_std
    angle = angle.double()
    ends = view(network, x, torch.cos(angle), data_std * torch.sin(angle), condition)  # type: ignore[arg-type]
    return velocity_of(ends, angle, data_std)
