"""Forward-mode derivatives of a student in its engine, and training that goes around the engine's wrapper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from parity_matrix import Trajectory
from recipe_cases import advance, close, recipe_on, with_engine
from sixfold.config.base import Component
from sixfold.distributed.process_group import join
from sixfold.objectives.contract import Networks, Phase, Progress
from sixfold.objectives.distillation.derivatives import directional_derivative
from sixfold.train.assembly import assemble
from sixfold.train.loop import Training


def derivative_of_student(config: Component, name: str, data: str) -> tuple[Tensor, Tensor]:
    """Value and derivative along a fixed direction of a recipe's student, as its objective takes them, and again."""
    training = assemble(with_engine(recipe_on(name, data), config, None), join())
    generator = torch.Generator().manual_seed(0)
    x, along_x = (torch.randn(4, 1, 8, 8, generator=generator) for _ in range(2))
    time, along_time = (torch.rand(4, generator=generator) for _ in range(2))
    labels = torch.arange(4)
    phase = training.objective.phases(Progress(samples=0, step=0, total_steps=1))[0]

    with training.networks_in(phase) as networks, training.engines["denoiser"].accumulate(last=True):

        def value(x: Tensor, time: Tensor) -> Tensor:
            told = {"interval": 0.5 * time} if "mean-flow" in name else {}
            found: Tensor = networks["denoiser"](x, time, {"label": labels, **told})
            return found

        first = directional_derivative(value, (x, time), (along_x, along_time))
        second = directional_derivative(value, (x, time), (along_x, along_time))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    close(training)
    return first


class Inner(nn.Module):
    """A network called past its hooks."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.network.forward(*inputs, **named)


class Bypassing(Training):
    """A training whose objectives get the inner networks, so that no hook of an engine's wrapper fires."""

    @contextmanager
    def networks_in(self, phase: Phase) -> Iterator[Networks]:
        with super().networks_in(phase) as networks:
            yield {**networks, **{role: Inner(self.engines[role].network) for role in phase.trains}}


def train_bypassing(config: Component, accumulation: int, name: str, data: str, steps: int) -> Trajectory:
    """:func:`recipe_cases.train_recipe` around the wrapper."""
    world = join()
    recipe = recipe_on(name, data)
    built = assemble(with_engine(recipe, config, recipe.data.global_batch // world.size // accumulation), world)
    training = Bypassing(**{field.name: getattr(built, field.name) for field in fields(Training)})
    try:
        done = [pair for _ in range(steps) for pair in advance(training)]
    finally:
        close(training)
    return Trajectory(losses=[loss for loss, _ in done], grad_norms=[norm for _, norm in done])
