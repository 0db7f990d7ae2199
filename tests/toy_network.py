"""A small network with what engines treat differently: blocks, matrices, a 3-D stack, vectors, odd sizes, buffers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from sixfold.config.base import Component
from sixfold.models.network import Linear, Network, OwnsBuffers, ParameterTag, constant, normal, parameter


class ToyConfig(Component):
    implementation: ClassVar[str] = "toy_network:Toy"
    width: int = 12
    depth: int = 2
    experts: int = 3
    classes: int = 7


class Block(OwnsBuffers):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        width = config.width
        self.norm = parameter(width, tag=constant(1.0))
        self.up = Linear(width, 2 * width + 1, tag=normal(width**-0.5), bias=True)
        self.down = Linear(2 * width + 1, width, tag=normal(0.2))
        self.stack = parameter(config.experts, width, width, tag=normal(0.3))
        self.register_buffer("shift", torch.empty(config.experts))
        self.register_buffer("phase", torch.empty(width), persistent=False)

    def reset_buffers(self) -> None:
        self.shift.copy_(torch.arange(len(self.shift)))
        self.phase.copy_(torch.linspace(0.0, 1.0, len(self.phase)))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6) * self.norm + self.phase
        x = x + self.down(nn.functional.gelu(self.up(hidden)))
        mixed = torch.einsum("nd,eod->eno", hidden, self.stack.to(hidden.dtype)) * self.shift[:, None, None].cos()
        return x + 0.1 * torch.tanh(mixed).sum(0), {"mean": hidden.detach().mean()}


class Toy(Network):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = parameter(
            config.classes, config.width, tag=ParameterTag(init="normal", scale=1.0, lr_scale=0.5)
        )
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Linear(config.width, config.classes, tag=ParameterTag(init="uniform", scale=0.3), bias=True)

    def blocks(self) -> Iterator[nn.Module]:
        yield from self.layers

    def forward_flops(self, batch_fields: dict[str, tuple[int, ...]]) -> float:
        raise NotImplementedError

    def forward(self, tokens: Tensor) -> Tensor:
        x = nn.functional.embedding(tokens, self.embedding)
        for block in self.layers:
            x, _ = block(x)
        return self.head(x)


def toy_batch(step: int, global_batch: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the step's global batch: tokens, targets and 0/1 weights whose sums differ between ranks."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(classes, (global_batch,), generator=generator)
    targets = (tokens * 3 + torch.randint(2, (global_batch,), generator=generator)) % classes
    weights = (torch.arange(global_batch) < 0.7 * global_batch) | (torch.rand(global_batch, generator=generator) < 0.3)
    return tokens, targets, weights.float()
