"""The convolutional U-Net of ADM (Dhariwal and Nichol, 2105.05233)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from sixfold.models.convolution import Conv2d, GroupNorm
from sixfold.models.dit.embedding import LabelEmbedding, TimeEmbedding
from sixfold.models.network import Network
from sixfold.models.unet.config import UNetConfig
from sixfold.models.unet.layers import ZERO_KERNEL, PixelAttention, Resample, ResidualBlock, Stage


class UNet(Network):
    """Residual stages down, in the middle and up; what each stage on the way down makes is joined on the way up.

    See :class:`~sixfold.models.unet.config.UNetConfig`.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embedding_width
        self.time = TimeEmbedding(width, frequencies=config.time_frequencies, scale=config.time_scale)
        self.label = LabelEmbedding(config.classes, width) if config.classes else None
        levels = list(zip(config.level_channels, config.sizes, strict=True))
        channels = levels[0][0]
        self.enter = Conv2d(config.channels, channels)
        made = [channels]  # what the way up joins, last first
        down, up = [], []
        for level, (outputs, size) in enumerate(levels):
            if level > 0:
                down.append(self._stage(channels, channels, size, "down", attends=False))
                made.append(channels)
            for _ in range(config.blocks_per_level):
                down.append(self._stage(channels, outputs, size))
                channels = outputs
                made.append(channels)
        self.down = nn.ModuleList(down)
        bottom = levels[-1][1]
        self.middle = nn.ModuleList(
            [
                self._stage(channels, channels, bottom, attends=True),
                self._stage(channels, channels, bottom, attends=False),
            ]
        )
        for level, (outputs, size) in reversed(list(enumerate(levels))):
            for _ in range(config.blocks_per_level + 1):
                up.append(self._stage(channels + made.pop(), outputs, size))
                channels = outputs
            if level > 0:
                up.append(self._stage(channels, channels, 2 * size, "up", attends=False))
        self.up = nn.ModuleList(up)
        self.norm = GroupNorm(config.groups, channels)
        self.leave = Conv2d(channels, config.channels, tag=ZERO_KERNEL)

    def _stage(
        self, inputs: int, outputs: int, size: int, resample: Resample | None = None, *, attends: bool | None = None
    ) -> Stage:
        """A stage whose result is ``size`` pixels high; it attends where the settings say, unless told."""
        config = self.config
        residual = ResidualBlock(
            inputs, outputs, groups=config.groups, embedding=config.embedding_width, resample=resample
        )
        attention = None
        if attends or (attends is None and size in config.attention_sizes):
            attention = PixelAttention(outputs, groups=config.groups, head_width=config.head_width)
        return Stage(residual, attention)

    def forward(
        self, x: Float[Tensor, "n c h w"], time: Float[Tensor, "n"], condition: Mapping[str, Tensor]
    ) -> Float[Tensor, "n c h w"]:
        """Return the prediction for noisy images; arguments as of :meth:`sixfold.models.dit.model.DiT.forward`."""
        embedded = self.time(time)
        if self.label is not None:
            embedded = embedded + self.label(condition["label"])
        activated = silu(embedded)
        hidden = self.enter(x.to(self.enter.weight.dtype))
        made = [hidden]
        for stage in self.down:
            hidden = stage(hidden, activated)
            made.append(hidden)
        for stage in self.middle:
            hidden = stage(hidden, activated)
        for stage in self.up:
            assert isinstance(stage, Stage)
            joins = stage.residual.resample is None
            hidden = stage(torch.cat([hidden, made.pop()], dim=1) if joins else hidden, activated)
        result: Tensor = self.leave(silu(self.norm(hidden)))
        return result

    def blocks(self) -> Iterator[nn.Module]:
        """The stages in the order in which they run."""
        yield from self.down
        yield from self.middle
        yield from self.up

    def forward_flops(self, batch_fields: dict[str, tuple[int, ...]]) -> float:
        """2 FLOPs a multiply-add: convolutions, maps of the condition, and attention's two products."""
        config = self.config
        cells = float(config.image_size**2)
        total = self.enter.flops(cells) + self.leave.flops(cells)
        total += 2.0 * (config.time_frequencies + config.embedding_width) * config.embedding_width
        for stage in self.blocks():
            assert isinstance(stage, Stage)
            factor = {"down": 0.25, "up": 4.0, None: 1.0}[stage.residual.resample]
            cells *= factor
            total += stage.flops(cells)
        return batch_fields["image"][0] * total
