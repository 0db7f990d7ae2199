"""The exponential moving average of a role's parameters, kept in fp32 wherever the engine keeps its shards."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sixfold.engine.sharding import local_tensors


def average_decay(decay: float, update: int) -> float:
    """Decay at the given update (1-based): min(decay, (1 + n) / (10 + n)): an average soon forgets its start."""
    return min(decay, (1 + update) / (10 + update))


class MovingAverage:
    """Averages of named fp32 tensors (DTensors are averaged shard by shard, without communication)."""

    def __init__(self, decay: float, parameters: Mapping[str, Tensor]) -> None:
        self.decay = decay
        self.parameters = parameters
        self.values = {name: value.detach().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, update: int) -> None:
        """e <- d e + (1 - d) p after the given update."""
        averages, parameters = local_tensors(list(self.values.values())), local_tensors(list(self.parameters.values()))
        torch._foreach_lerp_(averages, parameters, 1.0 - average_decay(self.decay, update))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the contents of averages and parameters, one tensor at a time; a second call undoes it."""
        pairs = zip(
            local_tensors(list(self.values.values())), local_tensors(list(self.parameters.values())), strict=True
        )
        for average, parameter in pairs:
            held = parameter.clone()
            parameter.copy_(average)
            average.copy_(held)

    @torch.no_grad()
    def restart(self) -> None:
        """Start the averages at the parameters' present values."""
        for name, value in self.values.items():
            value.copy_(self.parameters[name])
