"""Sampling in one or a few jumps, from students and one-step flows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sixfold.objectives.contract import Networks
from sixfold.objectives.distillation.consistency import GUIDANCE
from sixfold.objectives.distillation.mean_flow import INTERVAL
from sixfold.objectives.distillation.view import on_path
from sixfold.paths.predictions import Endpoints
from sixfold.samplers.config import FewStepConfig, UniformGridConfig
from sixfold.samplers.contract import SampleRequest
from sixfold.samplers.denoising import DenoisingSampler, Knots, NoiseSource, PredictEndpoints, everywhere, knots_at
from sixfold.samplers.grids import first_time


class FewStepSampler(DenoisingSampler):
    """Jump to the data that the student believes in and back to less noise, until none is left.

    ``stochastic`` noises the data anew each time (consistency models, 2303.01469, algorithm 1); else the noise that is
    believed to be in x is kept, as DDIM does. A mean flow (2505.13447, algorithm 2) is told how far each jump goes.
    """

    config: FewStepConfig

    def __init__(self, config: FewStepConfig, objective: Any, networks_config: Mapping[str, Any]) -> None:
        super().__init__(config, objective, networks_config)
        self.told_interval = getattr(objective, "jumps", "data") == "interval"

    def integrate(self, predict: PredictEndpoints, noise: NoiseSource, steps: int | None) -> Float[Tensor, "n ..."]:
        """Return clean samples in ``steps`` jumps."""
        times, alphas, sigmas = self._knots(steps)
        x = sigmas[0] * noise("noise")
        for step, time in enumerate(times):
            ends = predict(x, everywhere(time, x))
            if self.config.stochastic and not self.told_interval and step + 1 < len(times):
                ends = Endpoints(ends.data, noise(f"noise/{step + 1}"))
            x = on_path(ends, everywhere(alphas[step + 1], x), everywhere(sigmas[step + 1], x))
        return x

    def beliefs(self, nets: Networks, request: SampleRequest) -> PredictEndpoints:
        """Return the student's beliefs; numbers that it is conditioned on besides the time are added here."""
        student = _Told(self, nets["denoiser"], self._knots(request.steps))
        return super().beliefs({**nets, "denoiser": student}, request)

    def _knots(self, steps: int | None) -> Knots:
        """Return the given times; else, on an even grid, those at which students are trained for as many steps."""
        if self.config.times is not None and steps is None:
            return knots_at(self.path, torch.tensor(self.config.times, dtype=torch.float64))
        if not isinstance(self.config.grid, UniformGridConfig):
            return self.knots(steps)
        count = steps or self.config.steps
        fractions = 1.0 - torch.arange(count, dtype=torch.float64) / count
        start = first_time(self.path, needs_signal=self.objective.prediction == "noise")
        times = self.path.shift(self.path.time_at_fraction(fractions), self.config.grid.shift)
        return knots_at(self.path, times.clamp(max=start.item()))


class _Told(nn.Module):
    """The student with the numbers that it is conditioned on besides the time: how far a jump goes, which guidance."""

    def __init__(self, sampler: FewStepSampler, network: nn.Module, knots: Knots) -> None:
        super().__init__()
        self.sampler, self.network = sampler, network
        self.ends = torch.tensor([sampler.path.time_data, *reversed(knots.times)], dtype=torch.float64)

    def forward(self, x: Tensor, time: Float[Tensor, " n"], condition: Mapping[str, Tensor]) -> Tensor:
        """Call the student."""
        told = dict(condition)
        if self.sampler.told_interval:
            ends = self.ends.to(time)
            told[INTERVAL] = time - ends[(torch.searchsorted(ends, time.contiguous()) - 1).clamp(min=0)]
        if self.sampler.config.told_guidance is not None:
            told[GUIDANCE] = torch.full_like(time, self.sampler.config.told_guidance)
        value: Tensor = self.network(x, time, told)
        return value
