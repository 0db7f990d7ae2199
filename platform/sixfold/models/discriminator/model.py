"""PatchGAN without batch statistics; see :class:`~sixfold.models.discriminator.config.PatchDiscriminatorConfig`."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from sixfold.models.convolution import Conv2d, GroupNorm, channels_last
from sixfold.models.discriminator.config import PatchDiscriminatorConfig
from sixfold.models.network import Network

_KERNEL, _SLOPE = 4, 0.2


class Layer(nn.Module):
    """A 4x4 convolution, a norm where there is one, and a leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, groups: int | None) -> None:
        super().__init__()
        self.convolution = Conv2d(inputs, outputs, _KERNEL, stride=stride, padding=1)
        self.norm = None if groups is None else GroupNorm(groups, outputs)

    def forward(self, x: Float[Tensor, "n inputs h w"]) -> Float[Tensor, "n outputs rows columns"]:
        """Apply the layer."""
        x = self.convolution(x)
        return leaky_relu(x if self.norm is None else self.norm(x), _SLOPE)


class PatchDiscriminator(Network):
    """Halving layers, one more, and a convolution to logits."""

    def __init__(self, config: PatchDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        inputs = [config.channels, *config.widths[:-1]]
        self.layers = nn.ModuleList(
            Layer(
                narrow,
                wide,
                stride=2 if index < config.layers else 1,
                groups=config.groups if config.norm == "group" and index > 0 else None,
            )
            for index, (narrow, wide) in enumerate(zip(inputs, config.widths, strict=True))
        )
        self.output = Conv2d(config.widths[-1], 1, _KERNEL, padding=1)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 1 rows columns"]:
        """Return the logit of each patch: above 0 for real."""
        x = channels_last(images)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.output(x)
        return logits.float()

    def blocks(self) -> Iterator[nn.Module]:
        """The layers in order."""
        return iter(self.layers)

    def forward_flops(self, batch_fields: dict[str, tuple[int, ...]]) -> float:
        """2 FLOPs a multiply-add of every convolution."""
        n, _, height, width = batch_fields["image"]
        total = 0.0
        for layer in self.layers:
            assert isinstance(layer, Layer)
            stride = layer.convolution.stride
            height, width = (side // stride if stride > 1 else side - 1 for side in (height, width))
            total += layer.convolution.flops(float(height * width))
        return n * (total + self.output.flops(float((height - 1) * (width - 1))))
