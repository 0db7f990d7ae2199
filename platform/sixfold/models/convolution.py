"""Convolution and group normalisation with tagged parameters; neither looks across samples."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sixfold.models.network import ParameterTag, constant, parameter
from sixfold.models.precision import compute_dtype


def convolution(fan_in: int, gain: float = 1.0) -> ParameterTag:
    """A decayed kernel drawn uniformly with variance gain^2 / (3 fan_in), the field's habit for autoencoders."""
    return ParameterTag(init="uniform", scale=gain / math.sqrt(fan_in), weight_decay=True)


def channels_last(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Lay pixels' channels side by side, as the fast kernels of CPUs and of CUDA's reduced precision want them.

    Convolutions and norms keep the layout, so that a network's first line is enough.
    """
    return x.contiguous(memory_format=torch.channels_last)


class Conv2d(nn.Module):
    """A square kernel ``[out, in, size, size]`` with a bias.

    Args:
        inputs: channels in.
        outputs: channels out.
        size: side of the kernel.
        stride: pixels between outputs.
        padding: zeros on each side; by default what keeps the size at stride 1 (odd kernels).
        tag: of the kernel; by default uniform by its fan-in.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: int | None = None,
        tag: ParameterTag | None = None,
    ) -> None:
        super().__init__()
        self.stride, self.padding = stride, (size - 1) // 2 if padding is None else padding
        self.multiplications = inputs * outputs * size * size
        self.weight = parameter(outputs, inputs, size, size, tag=tag or convolution(inputs * size * size))
        self.bias = parameter(outputs, tag=constant(0.0))

    def forward(self, x: Float[Tensor, "n inputs height width"]) -> Float[Tensor, "n outputs rows columns"]:
        """Convolve."""
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride, self.padding)

    def flops(self, cells: float) -> float:
        """FLOPs of one image whose *output* has this many cells."""
        return 2.0 * self.multiplications * cells


class GroupNorm(nn.Module):
    """Normalisation of groups of channels of one image (Wu and He, arXiv 1803.08494), then a scale and shift each."""

    def __init__(self, groups: int, channels: int, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.groups, self.epsilon = groups, epsilon
        self.weight = parameter(channels, tag=constant(1.0))
        self.bias = parameter(channels, tag=constant(0.0))

    def forward(self, x: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n channels height width"]:
        """Normalise; the result has the type that convolutions run in."""
        normalized = nn.functional.group_norm(x, self.groups, self.weight, self.bias, self.epsilon)
        return normalized.to(compute_dtype(x))
