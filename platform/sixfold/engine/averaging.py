"""Moving averages of a role's parameters, kept in fp32 wherever the engine keeps its shards.

A power average after t updates weighs the parameters after update k by the integral of (g + 1) x^g / t^(g + 1) over
x from k - 1 to k: its memory is a fixed share of training, however long that is (EDM2, 2312.02696, equation 5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sixfold.engine.averaging_config import AverageConfig, ConstantAverageConfig
from sixfold.engine.sharding import local_tensors

MAIN = "ema"
"""The kind of the average that is sampled and evaluated; further ones are ``ema_<width>``."""

_BISECTIONS = 200


def kinds_of(config: AverageConfig) -> tuple[str, ...]:
    """The names under which a checkpoint holds a role's averages, the main one first."""
    if isinstance(config, ConstantAverageConfig):
        return (MAIN,)
    return (MAIN, *(f"{MAIN}_{width:g}" for width in config.widths[1:]))


def decays(config: AverageConfig, update: int) -> tuple[float, ...]:
    """Each average's decay at the given update (1-based).

    A constant decay d is min(d, (1 + n) / (10 + n)) at first, so that an average soon forgets its start; a power
    average's is (1 - 1/t)^(g + 1), 0 at the first update.
    """
    if isinstance(config, ConstantAverageConfig):
        return (min(config.decay, (1 + update) / (10 + update)),)
    return tuple((1.0 - 1.0 / update) ** (exponent_of(width) + 1.0) for width in config.widths)


def exponent_of(width: float) -> float:
    """Return the exponent g whose profile has this width: (g + 1) / ((g + 2)^2 (g + 3)) = width^2, g >= 0.

    The width falls from 0.289 at g = 0 (the plain mean) towards 1 / g.
    """
    low, high = 0.0, 2.0 / width
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if width_of(middle) > width:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def width_of(exponent: float) -> float:
    """Return the standard deviation of a power profile over training of length 1."""
    return math.sqrt((exponent + 1.0) / ((exponent + 2.0) ** 2 * (exponent + 3.0)))


class MovingAverages:
    """Averages of named fp32 tensors (DTensors are averaged shard by shard, without communication).

    Args:
        config: which averages.
        parameters: what they start from.
    """

    def __init__(self, config: AverageConfig, parameters: Mapping[str, Tensor]) -> None:
        self._config = config
        self.values: dict[str, dict[str, Tensor]] = {
            kind: {name: value.detach().clone() for name, value in parameters.items()} for kind in kinds_of(config)
        }

    @property
    def main(self) -> dict[str, Tensor]:
        """The average that is sampled and evaluated."""
        return self.values[MAIN]

    @torch.no_grad()
    def update(self, update: int, parameters: Mapping[str, Tensor]) -> None:
        """e <- d e + (1 - d) p after the given update."""
        for averages, decay in zip(self.values.values(), decays(self._config, update), strict=True):
            present = [parameters[name].to(value.device) for name, value in averages.items()]
            torch._foreach_lerp_(local_tensors(list(averages.values())), local_tensors(present), 1.0 - decay)

    @torch.no_grad()
    def swap(self, parameters: Mapping[str, Tensor]) -> None:
        """Exchange the main average's contents with the parameters', one at a time; a second call undoes it."""
        pairs = zip(local_tensors(list(self.main.values())), local_tensors(list(parameters.values())), strict=True)
        for average, parameter in pairs:
            held = parameter.clone()
            parameter.copy_(average)
            average.copy_(held)

    def state(self) -> dict[str, Tensor]:
        """Every average by the name it has in a checkpoint, ``<kind>/<parameter>``."""
        return {f"{kind}/{name}": value for kind, values in self.values.items() for name, value in values.items()}
