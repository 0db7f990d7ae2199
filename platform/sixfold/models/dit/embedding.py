"""What a DiT reads: patches at sinusoidal positions, the time, the label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sixfold.models.dit.config import DiTConfig
from sixfold.models.network import ZERO_MATRIX, Linear, OwnsBuffers, ParameterTag, normal, parameter, xavier_uniform

_LONGEST_PERIOD = 10_000.0


def patchify(images: Float[Tensor, "n c h w"], patch: int) -> Float[Tensor, "n tokens features"]:
    """Cut images into patches, row by row; features in the order (channel, y, x)."""
    n, channels, height, width = images.shape
    grid = images.view(n, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, channels * patch * patch)


def unpatchify(
    tokens: Float[Tensor, "n tokens features"], patch: int, channels: int, rows: int | None = None
) -> Float[Tensor, "n c h w"]:
    """Put images together from ``rows`` rows of patches (None: square); features in the order (y, x, channel)."""
    n, count, _ = tokens.shape
    rows = math.isqrt(count) if rows is None else rows
    grid = tokens.view(n, rows, count // rows, patch, patch, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(n, channels, rows * patch, count // rows * patch)


def sinusoids(positions: Float[Tensor, "n"], width: int) -> Float[Tensor, "n width"]:
    """[cos, sin] of position * 10000^(-i / half), i < half = width / 2 (Vaswani et al., arXiv 1706.03762)."""
    half = width // 2
    index = torch.arange(half, device=positions.device, dtype=positions.dtype)
    angles = positions[:, None] * torch.exp(-math.log(_LONGEST_PERIOD) / half * index)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_sinusoids(side: int, width: int, device: torch.device) -> Float[Tensor, "tokens width"]:
    """Return [sin x, cos x, sin y, cos y] of each cell of a square grid, row by row, each a quarter of ``width``."""
    axis = torch.arange(side, device=device, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    parts = [sinusoids(coordinate.flatten(), width // 2).chunk(2, dim=-1)[::-1] for coordinate in (x, y)]
    return torch.cat([half for part in parts for half in part], dim=-1).float()


class PatchEmbedding(OwnsBuffers):
    """A linear map of each patch, plus its fixed position."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        features = config.channels * config.patch_size**2
        self.projection = Linear(features, config.width, tag=xavier_uniform(features, config.width), bias=True)
        self.position: Tensor
        self.register_buffer("position", torch.empty(config.tokens, config.width), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Recompute the positions."""
        tokens, width = self.position.shape
        self.position.copy_(grid_sinusoids(math.isqrt(tokens), width, self.position.device))

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n tokens width"]:
        """Embed images, in the type of the weights."""
        embedded: Tensor = self.projection(patchify(images, self.patch).to(self.projection.weight.dtype))
        return embedded + self.position.to(embedded.dtype)


class TimeEmbedding(nn.Module):
    """A two-layer MLP over sinusoids of the scaled time, which are fp32, or fp64 where the time is."""

    def __init__(self, width: int, *, frequencies: int, scale: float, silent: bool = False) -> None:
        """With ``silent`` it begins by adding nothing: a trained network can be given one without changing it."""
        super().__init__()
        self.scale, self.frequencies = scale, frequencies
        self.inner = Linear(frequencies, width, tag=normal(0.02), bias=True)
        self.outer = Linear(width, width, tag=ZERO_MATRIX if silent else normal(0.02), bias=True)

    def forward(self, time: Float[Tensor, "n"]) -> Float[Tensor, "n width"]:
        """Embed times in [0, 1]."""
        time = time.to(torch.promote_types(time.dtype, torch.float32))
        waves = sinusoids(time * self.scale, self.frequencies).to(self.inner.weight.dtype)
        embedded: Tensor = self.outer(nn.functional.silu(self.inner(waves)))
        return embedded


class ScalarEmbeddings(nn.ModuleDict):
    """Numbers that a network is told besides the time, embedded alike; they begin by adding nothing."""

    def __init__(self, names: Sequence[str], width: int, *, frequencies: int, scale: float) -> None:
        super().__init__(
            {name: TimeEmbedding(width, frequencies=frequencies, scale=scale, silent=True) for name in names}
        )

    def forward(
        self, embedded: Float[Tensor, "n width"], time: Float[Tensor, "n"], condition: Mapping[str, Tensor]
    ) -> Float[Tensor, "n width"]:
        """Add the embedding of each number ``[n]`` in ``condition``, 0 where it is left out, to that of the time."""
        for name, scalar in self.items():
            embedded = embedded + scalar(condition.get(name, torch.zeros_like(time)))
        return embedded


class LabelEmbedding(nn.Module):
    """A vector for each label, and one more, the last, for no label."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.weight = parameter(classes + 1, width, tag=ParameterTag(init="normal", scale=0.02))

    def forward(self, label: Int64[Tensor, "n"]) -> Float[Tensor, "n width"]:
        """Look up labels; ``classes`` is the null label."""
        return nn.functional.embedding(label, self.weight)
