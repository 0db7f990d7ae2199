"""Distillation on Gaussian data N(MEAN, STD^2), for which every flow map is known: what its proofs stand on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from exact_denoisers import ExactDenoiser, gaussian_posterior
from sixfold.config.base import Component
from sixfold.distributed.randomness import PositionRandom
from sixfold.models.dit.config import DiTConfig
from sixfold.models.trained.network import NetworksConfig, TrainedNetwork
from sixfold.objectives.contract import Batch, Progress
from sixfold.objectives.denoising.config import DenoisingConfig
from sixfold.paths.config import PathConfig, RectifiedFlowConfig
from sixfold.samplers.config import FewStepConfig
from sixfold.samplers.contract import SampleRequest
from sixfold.samplers.denoising import NoiseSource

MEAN, STD, SIZE = 0.3, 0.5, 2


def images_of(size: int) -> DiTConfig:
    """Settings of a denoiser of such images; tests call functions in its place."""
    numbers = ("interval", "guidance")
    return DiTConfig(image_size=size, patch_size=1, channels=1, width=4, depth=1, heads=1, scalars=numbers)


def settings(path: PathConfig | None = None, prediction: str = "velocity") -> DenoisingConfig:
    """How a denoiser of the data is trained."""
    return DenoisingConfig(path=path or RectifiedFlowConfig(), prediction=prediction, data_std=STD)


def networks(teacher: DenoisingConfig | None = None, student: DiTConfig | None = None) -> NetworksConfig:
    """What objectives are built with: a teacher from another run, a student of the same images."""
    found: dict[str, Any] = {"denoiser": student or images_of(SIZE)}
    if teacher is not None:
        found["teacher"] = TrainedNetwork(
            architecture=images_of(SIZE), objective=teacher, run=None, role="denoiser", averaged=False
        )
    return found


def build(config: Component, teacher: DenoisingConfig | None = None) -> Any:
    """The objective that the settings describe."""
    return config.load()(config, networks(teacher))


def exact(of: DenoisingConfig | None = None) -> ExactDenoiser:
    """The denoiser that is right."""
    return ExactDenoiser(of or settings(), gaussian_posterior(MEAN, STD))


def gaussian_batch(count: int, first: int = 0) -> Batch:
    """``count`` samples ``[count, 1, SIZE, SIZE]`` from position ``first`` on."""
    positions = torch.arange(first, first + count)
    data = MEAN + STD * PositionRandom(7, positions).normal("data", (1, SIZE, SIZE))
    return Batch({"image": data}, positions)


def spread(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Standard deviation of alpha x0 + sigma e."""
    return torch.sqrt(alpha**2 * STD**2 + sigma**2)


def exact_map(x: Tensor, start: tuple[Tensor, Tensor], stop: tuple[Tensor, Tensor]) -> Tensor:
    """Where the probability flow takes x from (alpha, sigma) at ``start`` to those at ``stop``."""
    shape = (-1, *[1] * (x.ndim - 1))
    (a, s), (b, r) = ([value.reshape(shape) for value in pair] for pair in (start, stop))
    return b * MEAN + spread(b, r) / spread(a, s) * (x - a * MEAN)


class Affine(nn.Module):
    """A student that can be the exact flow map: velocity a(t) x + b(t), with smooth a and b of the times it is told."""

    def __init__(self, inputs: int = 1):
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(inputs, 64)
        self.inner = nn.Linear(64, 64)
        self.outer = nn.Linear(64, 2)

    def forward(self, x: Tensor, time: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        told = [time] + ([condition["interval"]] if "interval" in condition else [])
        told += [torch.zeros_like(time)] * (self.hidden.in_features - len(told))
        a, b = self.outer(torch.tanh(self.inner(torch.tanh(2 * self.hidden(torch.stack(told, -1)))))).unbind(-1)
        return a[:, None, None, None] * x + b[:, None, None, None]


class Moments(nn.Module):
    """The mean velocity from t to r (0 where no interval is told) of the flow of N(m, s^2), with m and s to be learnt.

    C_t = (1-t)^2 s^2 + t^2 is the variance at t and q = sqrt(C_r / C_t). Then x_t - x_r = (t - r) u with
    u = -m - (s^2 (2 - r - t) - r - t) / (C_t (1 + q)) (x_t - (1-t) m), which is smooth where r meets t.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(-0.2))
        self.log_std = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor, time: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        t = time.reshape(-1, 1, 1, 1)
        r = t - condition.get("interval", time).reshape(t.shape)
        variance = torch.exp(2 * self.log_std)
        now, then = ((1 - end) ** 2 * variance + end**2 for end in (t, r))
        slope = (variance * (2 - r - t) - r - t) / (now * (1 + torch.sqrt(then / now)))
        return -self.mean - slope * (x - (1 - t) * self.mean)


def train(objective: Any, nets: dict[str, nn.Module], steps: int, lr: float = 5e-3, batch: int = 128) -> nn.Module:
    """Train the student and return it."""
    student = nets["denoiser"]
    optimizer = torch.optim.Adam(student.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        phases = objective.phases(Progress(samples=0, step=step, total_steps=steps))
        data = gaussian_batch(batch, first=step * batch)
        terms = objective(nets, data, phases[-1], PositionRandom(3, data.positions))
        optimizer.zero_grad()
        torch.autograd.backward(terms.loss / terms.count)
        optimizer.step()
        schedule.step()
    return student


@torch.no_grad()
def map_error(config: Component, student: nn.Module, teacher: DenoisingConfig | None = None, steps: int = 1) -> float:
    """Root mean square of samples' distance from the exact flow map of the same noise, over the data's std.

    Samples are compared as the solver leaves them, before they are clamped to what an image can be.
    """
    few_step = FewStepConfig(steps=steps, stochastic=False)
    sampler = few_step.load()(few_step, config, networks(teacher))
    sampler.path.time_data = 0.0
    request = SampleRequest(seed=11, numbers=torch.arange(512), conditions={})
    noise = NoiseSource(random=PositionRandom(request.seed, request.numbers), shape=sampler.shape)
    drawn = sampler.integrate(sampler.beliefs({"denoiser": student}, request), noise, steps)
    return float((drawn - (MEAN + STD * noise("noise"))).square().mean().sqrt() / STD)
