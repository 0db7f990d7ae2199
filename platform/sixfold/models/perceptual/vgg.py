"""The features of LPIPS (Zhang et al., arXiv 1801.03924): VGG-16's, normalised and weighted channel by channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from sixfold.errors import RecipeError
from sixfold.models.convolution import Conv2d
from sixfold.models.network import Network, OwnsBuffers, constant, parameter
from sixfold.models.perceptual.config import LPIPSConfig
from sixfold.models.perceptual.features import EMBEDDING, unit_normalized

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG-16's convolutions; stages are parted by max pooling (arXiv 1409.1556, configuration D)."""

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""LPIPS's normalisation of images in [-1, 1]."""

_COLOURS = 3


class Stage(nn.Module):
    """Convolutions with ReLU at one resolution."""

    def __init__(self, inputs: int, outputs: tuple[int, ...]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            Conv2d(narrow, wide) for narrow, wide in zip((inputs, *outputs), outputs, strict=False)
        )

    def forward(self, x: Float[Tensor, "n inputs h w"]) -> Float[Tensor, "n outputs h w"]:
        """Apply the stage."""
        for convolution in self.convolutions:
            x = relu(convolution(x))
        return x


class LPIPSFeatures(OwnsBuffers, Network):
    """VGG-16 without its classifier, and the weights of the channels after each stage."""

    def __init__(self, config: LPIPSConfig) -> None:
        super().__init__()
        widths = [stage[-1] for stage in STAGES]
        self.stages = nn.ModuleList(
            Stage(inputs, outputs) for inputs, outputs in zip((_COLOURS, *widths), STAGES, strict=False)
        )
        self.channel_weights = nn.ParameterList(parameter(width, tag=constant(1.0)) for width in widths)
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.empty(_COLOURS, 1, 1), persistent=False)
        self.register_buffer("scale", torch.empty(_COLOURS, 1, 1), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Write the normalisation of images."""
        self.shift.copy_(torch.tensor(_SHIFT)[:, None, None])
        self.scale.copy_(torch.tensor(_SCALE)[:, None, None])

    def forward(self, images: Float[Tensor, "n c h w"]) -> dict[str, Tensor]:
        """Return a map after each stage, and the last one's mean over positions as ``embedding``.

        Grey images are taken as red, green and blue alike.
        """
        x = (images.expand(-1, _COLOURS, -1, -1) - self.shift) / self.scale
        features: dict[str, Tensor] = {}
        for number, stage in enumerate(self.stages, start=1):
            x = stage(x if number == 1 else max_pool2d(x, 2))
            weight = self.channel_weights[number - 1].sqrt()[:, None, None]
            features[f"map_{number}"] = unit_normalized(x.float()) * weight
        return {**features, EMBEDDING: x.float().mean((2, 3))}

    def blocks(self) -> Iterator[nn.Module]:
        """The stages in order."""
        return iter(self.stages)

    def forward_flops(self, batch_fields: dict[str, tuple[int, ...]]) -> float:
        """2 FLOPs a multiply-add of every convolution."""
        n, _, height, width = batch_fields["image"]
        total, inputs = 0.0, _COLOURS
        for number, outputs in enumerate(STAGES):
            cells = (height >> number) * (width >> number)
            for width_out in outputs:
                total += 2.0 * 9 * inputs * width_out * cells
                inputs = width_out
        return n * total


def read_weights(config: LPIPSConfig, split: Callable[[], object]) -> dict[str, Tensor]:
    """Read both files into the network's names; the data are not needed.

    Raises:
        RecipeError: a file is missing or does not hold these weights.
    """
    vgg = _read(config.vgg, "vgg")
    weights: dict[str, Tensor] = {}
    # torchvision numbers convolutions, activations and poolings alike
    number = 0
    for stage, outputs in enumerate(STAGES):
        for index in range(len(outputs)):
            for part in ("weight", "bias"):
                weights[f"stages.{stage}.convolutions.{index}.{part}"] = _take(
                    vgg, f"features.{number}.{part}", config.vgg
                )
            number += 2
        number += 1
    linear = {} if config.weights is None else _read(config.weights, "weights")
    for stage, outputs in enumerate(STAGES):
        # without judgements of people, channels count alike, as in LPIPS's own baseline
        whole = torch.ones(outputs[-1])
        if config.weights is not None:
            whole = _take(linear, f"lin{stage}.model.1.weight", config.weights).flatten()
        weights[f"channel_weights.{stage}"] = whole
    return weights


def _read(file: str, key: str) -> dict[str, Tensor]:
    path = Path(file)
    if not path.is_file():
        raise RecipeError.of(
            f"there is no file {file}", where=f"networks.*.{key}", fix="download the weights once and name their file"
        )
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    read: Any = torch.load(path, map_location="cpu", weights_only=True)
    return dict(read)


def _take(weights: dict[str, Tensor], name: str, file: str) -> Tensor:
    if name not in weights:
        raise RecipeError.of(
            f"{file} holds no {name!r}",
            where="networks.*",
            allowed="torchvision's vgg16 (features.*) and LPIPS's channel weights (lin*.model.1.weight)",
            fix="name the right file",
        )
    return weights[name].float()
