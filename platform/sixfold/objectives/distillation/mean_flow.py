"""MeanFlow: u(x_t, r, t), the mean velocity from t to r, so that x_r = x_t - (t - r) u in one jump (2505.13447)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sixfold.distributed.randomness import PositionRandom
from sixfold.errors import RecipeError
from sixfold.objectives.contract import Networks, Phase
from sixfold.objectives.distillation.common import Drawn, FewStepObjective, PerSample, require_scalar
from sixfold.objectives.distillation.derivatives import directional_derivative
from sixfold.objectives.distillation.mean_flow_config import MeanFlowConfig
from sixfold.objectives.distillation.view import on_path
from sixfold.paths.affine import RectifiedFlow
from sixfold.paths.predictions import Endpoints
from sixfold.paths.times import time_at_quantile

INTERVAL = "interval"
"""The condition by which a denoiser is told t - r."""


class MeanFlow(FewStepObjective):
    """|u - sg(v - (t - r) du/dt)|^2, adaptively weighted, on the rectified path."""

    config: MeanFlowConfig

    def __init__(self, config: MeanFlowConfig, networks_config: Mapping[str, Any]) -> None:
        super().__init__(config, networks_config)
        if not isinstance(self.student.path, RectifiedFlow) or self.student.settings.prediction != "velocity":
            raise RecipeError.of(
                "mean flow averages the velocity of straight paths, and the student has another path or prediction",
                where="objective.path",
                allowed="path rectified_flow with prediction velocity",
                fix="set objective.path.type=rectified_flow and objective.prediction=velocity, with a fresh student",
            )
        require_scalar(config, networks_config, INTERVAL, "a mean flow is told the interval that it averages over")

    def loss(self, nets: Networks, drawn: Drawn, phase: Phase, random: PositionRandom) -> PerSample:
        """Return the weighted squared error of each sample."""
        stop, time = (end.to(drawn.data) for end in self._interval(drawn, random))
        x = on_path(Endpoints(drawn.data, drawn.noise), 1.0 - time, time)
        velocity = self._velocity(nets, x, time, drawn)

        def mean_velocity(x: Tensor, stop: Tensor, time: Tensor) -> Tensor:
            value: Tensor = nets["denoiser"](x, time, {**drawn.condition, INTERVAL: time - stop})
            return value.to(x.dtype)

        along = (velocity, torch.zeros_like(stop), torch.ones_like(time))
        _, change = directional_derivative(mean_velocity, (x, stop, time), along)
        target = velocity - (time - stop).reshape(-1, *[1] * (x.ndim - 1)) * change
        error = (mean_velocity(x, stop, time) - target).square().flatten(1).sum(1)
        weight = (error.detach() + self.config.weight_offset) ** -self.config.weight_power
        return PerSample(weight * error, {"squared_error": error})

    def _interval(self, drawn: Drawn, random: PositionRandom) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Return r <= t; equal for a part of the samples."""
        ends = [
            time_at_quantile(self.config.time, self.student.path, quantile)
            for quantile in (drawn.quantile, random.uniform("distillation/stop").double())
        ]
        time, stop = torch.maximum(*ends), torch.minimum(*ends)
        empty = random.uniform("distillation/empty") < self.config.instantaneous_fraction
        return torch.where(empty, time, stop), time

    def _velocity(self, nets: Networks, x: Tensor, time: Tensor, drawn: Drawn) -> Float[Tensor, "n ..."]:
        """Return the velocity that drives x: the teacher's, or the sample's own with guidance mixed in (eq. 19).

        A sample whose condition was dropped stands for no condition, and keeps its own: guided it would follow itself.
        """
        if self.teacher is not None:
            ends = self.teach(nets, x, 1.0 - time, time, drawn)
            return ends.noise - ends.data
        own = drawn.noise - drawn.data
        if self.config.guidance == 1.0:
            return own
        with torch.no_grad():
            null = {**drawn.null, INTERVAL: torch.zeros_like(time)}
            unconditional: Tensor = nets["denoiser"](x, time, null).to(x.dtype)
        guided = self.config.guidance * own + (1.0 - self.config.guidance) * unconditional
        return torch.where(unconditioned(drawn).reshape(-1, *[1] * (x.ndim - 1)), own, guided)


def unconditioned(drawn: Drawn) -> Bool[Tensor, " n"]:
    """Tell whose conditions are all absent."""
    absent = [(value == drawn.null[name]).reshape(len(value), -1).all(1) for name, value in drawn.condition.items()]
    everywhere = torch.ones(len(drawn.data), dtype=torch.bool, device=drawn.data.device)
    return torch.stack([everywhere, *absent]).all(0)
