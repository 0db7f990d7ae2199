"""Learning from the teacher's trajectories: straightening them (reflow), or taking two steps in one (progressive)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sixfold.distributed.randomness import PositionRandom
from sixfold.objectives.contract import Networks, Phase
from sixfold.objectives.distillation.common import Drawn, FewStepObjective, PerSample, require_teacher
from sixfold.objectives.distillation.trajectory_config import ProgressiveConfig, ReflowConfig
from sixfold.objectives.distillation.view import on_path
from sixfold.paths.predictions import Endpoints, express
from sixfold.paths.times import time_at_quantile


class Reflow(FewStepObjective):
    """Flow matching where the data of each noise are where the teacher's flow takes it."""

    config: ReflowConfig

    def __init__(self, config: ReflowConfig, networks_config: Mapping[str, Any]) -> None:
        super().__init__(config, networks_config)
        require_teacher(config, f"objective {config.type} learns from a teacher")

    def loss(self, nets: Networks, drawn: Drawn, phase: Phase, random: PositionRandom) -> PerSample:
        """Return the squared error of each sample's prediction."""
        ends = Endpoints(self._carried(nets, drawn), drawn.noise)
        time = time_at_quantile(self.config.time, self.student.path, drawn.quantile)
        at = self.student.path.coefficients(time).to(drawn.data)
        found = self.student(nets["denoiser"], on_path(ends, at.alpha, at.sigma), at.alpha, at.sigma, drawn.condition)
        kind, data_std = self.student.settings.prediction, self.student.settings.data_std
        error = express(found, kind, at, data_std) - express(ends, kind, at, data_std)
        return PerSample(error.square().flatten(1).mean(1))

    @torch.no_grad()
    def _carried(self, nets: Networks, drawn: Drawn) -> Float[Tensor, "n ..."]:
        """Return where the teacher's flow takes the noise.

        All paths have the same trajectories, in other units and at other speeds. Whatever the teacher knows, they are
        followed on the trigonometric path x = cos(t) x0 + sin(t) sd e, on which x keeps its size, by Heun's method in
        even steps: the first steps on EDM's own path, of 80 times the data's size, lose everything.
        """
        assert self.teacher is not None
        data_std = self.teacher.settings.data_std
        steps = self.config.solver_steps
        angles = torch.linspace(0.5 * math.pi, 0.0, steps + 1, dtype=torch.float64, device=drawn.quantile.device)
        alphas, sigmas = torch.cos(angles), data_std * torch.sin(angles)
        alphas[0], sigmas[-1] = 0.0, 0.0
        x = sigmas[0].to(drawn.noise) * drawn.noise
        for step in range(steps):
            (alpha, next_alpha), (sigma, next_sigma) = (part[step : step + 2].unbind() for part in (alphas, sigmas))
            here = self.teach(nets, x, _everywhere(alpha, x), _everywhere(sigma, x), drawn)
            change = (next_alpha - alpha) * here.data + (next_sigma - sigma) * here.noise
            if step + 1 < steps:
                there = self.teach(nets, x + change, _everywhere(next_alpha, x), _everywhere(next_sigma, x), drawn)
                second = (next_alpha - alpha) * there.data + (next_sigma - sigma) * there.noise
                change = 0.5 * (change + second)
            x = x + change
        return x


class Progressive(FewStepObjective):
    """The student's belief at t is the one whose single step ends where two half steps of the teacher end."""

    config: ProgressiveConfig

    def __init__(self, config: ProgressiveConfig, networks_config: Mapping[str, Any]) -> None:
        super().__init__(config, networks_config)
        require_teacher(config, f"objective {config.type} learns from a teacher")

    def loss(self, nets: Networks, drawn: Drawn, phase: Phase, random: PositionRandom) -> PerSample:
        """Return the squared error of the belief about the data, weighted by max(SNR, 1) (section 4)."""
        path, steps = self.student.path, self.config.student_steps
        index = (drawn.quantile * steps).floor().clamp(max=steps - 1) + 1.0
        start, half, stop = (
            path.coefficients(path.time_at_fraction((index - back) / steps)) for back in (0.0, 0.5, 1.0)
        )
        x = on_path(Endpoints(drawn.data, drawn.noise), start.alpha, start.sigma)
        with torch.no_grad():
            middle = on_path(self.teach(nets, x, start.alpha, start.sigma, drawn), half.alpha, half.sigma)
            end = on_path(self.teach(nets, middle, half.alpha, half.sigma, drawn), stop.alpha, stop.sigma)
            target = implied_data(x, end, start=start[:2], stop=stop[:2])
        found = self.student(nets["denoiser"], x, start.alpha, start.sigma, drawn.condition).data
        weight = (start.alpha / start.sigma).square().clamp(min=1.0)
        return PerSample(weight.to(found) * (found - target).square().flatten(1).mean(1))


def implied_data(
    x: Float[Tensor, "n ..."], end: Float[Tensor, "n ..."], *, start: tuple[Tensor, ...], stop: tuple[Tensor, ...]
) -> Float[Tensor, "n ..."]:
    """Return the x0 for which one DDIM step from ``x`` at ``start`` = (alpha, sigma) ends in ``end`` at ``stop``."""
    shape = (-1, *[1] * (x.ndim - 1))
    ratio = (stop[1] / start[1]).to(x).reshape(shape)
    return (end - ratio * x) / ((stop[0] - stop[1] / start[1] * start[0]).to(x).reshape(shape))


def _everywhere(value: Tensor, x: Tensor) -> Tensor:
    return value.expand(len(x))
