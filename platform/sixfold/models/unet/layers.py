"""The U-Net's blocks: conditioned residual convolutions, and attention over pixels."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, silu

from sixfold.models.attention import full_attention
from sixfold.models.convolution import Conv2d, GroupNorm
from sixfold.models.network import Linear, ParameterTag, xavier_uniform

ZERO_KERNEL = ParameterTag(init="constant", scale=0.0, weight_decay=True)
"""The last kernel of a branch, so that the branch starts as nothing."""

Resample = Literal["down", "up"]


def resampled(x: Float[Tensor, "n c h w"], how: Resample | None) -> Float[Tensor, "n c rows columns"]:
    """Halve by averaging 2 x 2 pixels, or double by repeating them."""
    if how == "down":
        return avg_pool2d(x, 2)
    return x if how is None else interpolate(x, scale_factor=2.0, mode="nearest")


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))) (1 + scale) + shift)), scale and shift from the condition (2105.05233).

    Where the size changes, it changes between the first activation and the first convolution, and on the way past.
    """

    def __init__(
        self, inputs: int, outputs: int, *, groups: int, embedding: int, resample: Resample | None = None
    ) -> None:
        super().__init__()
        self.resample: Resample | None = resample
        self.condition_map = 2 * embedding * outputs
        self.first_norm, self.first = GroupNorm(groups, inputs), Conv2d(inputs, outputs)
        self.modulation = Linear(embedding, 2 * outputs, tag=xavier_uniform(embedding, 2 * outputs), bias=True)
        self.second_norm, self.second = GroupNorm(groups, outputs), Conv2d(outputs, outputs, tag=ZERO_KERNEL)
        self.past = None if inputs == outputs else Conv2d(inputs, outputs, 1)

    def forward(
        self, x: Float[Tensor, "n c h w"], condition: Float[Tensor, "n width"]
    ) -> Float[Tensor, "n outputs rows columns"]:
        """Apply the block; ``condition`` is the embedded condition after its SiLU."""
        hidden = self.first(resampled(silu(self.first_norm(x)), self.resample))
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        hidden = self.second(silu(torch.addcmul(shift, self.second_norm(hidden), 1.0 + scale)))
        x = resampled(x, self.resample)
        result: Tensor = hidden + (x if self.past is None else self.past(x))
        return result

    def flops(self, cells: float) -> float:
        """FLOPs of one image of ``cells`` pixels *after* resampling."""
        past = 0.0 if self.past is None else self.past.flops(cells)
        return self.first.flops(cells) + self.second.flops(cells) + past + 2.0 * self.condition_map


class PixelAttention(nn.Module):
    """x + projection(attention(norm(x))), every pixel a token."""

    def __init__(self, channels: int, *, groups: int, head_width: int) -> None:
        super().__init__()
        self.channels, self.heads = channels, channels // head_width
        self.norm = GroupNorm(groups, channels)
        self.query, self.key, self.value = (Conv2d(channels, channels, 1) for _ in range(3))
        self.output = Conv2d(channels, channels, 1, tag=ZERO_KERNEL)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Mix pixels."""
        normalized = self.norm(x)
        query, key, value = (
            part(normalized).flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)
            for part in (self.query, self.key, self.value)
        )
        mixed = full_attention(query, key, value).transpose(2, 3)
        result: Tensor = x + self.output(mixed.reshape(x.shape))
        return result

    def flops(self, cells: float) -> float:
        """FLOPs of one image of ``cells`` pixels."""
        return 4.0 * self.output.flops(cells) + 4.0 * self.channels * cells**2


class Stage(nn.Module):
    """A residual block and, where the size has it, attention: the unit of sharding and recomputation."""

    def __init__(self, residual: ResidualBlock, attention: PixelAttention | None) -> None:
        super().__init__()
        self.residual, self.attention = residual, attention

    def forward(
        self, x: Float[Tensor, "n c h w"], condition: Float[Tensor, "n width"]
    ) -> Float[Tensor, "n outputs rows columns"]:
        """Apply both."""
        x = self.residual(x, condition)
        return x if self.attention is None else self.attention(x)

    def flops(self, cells: float) -> float:
        """FLOPs of one image of ``cells`` pixels after resampling."""
        return self.residual.flops(cells) + (0.0 if self.attention is None else self.attention.flops(cells))
