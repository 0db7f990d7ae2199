"""The convolutional autoencoder; see :class:`~sixfold.models.codec.config.CodecConfig`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from sixfold.models.codec.config import CodecConfig
from sixfold.models.codec.layers import (
    ChannelToSpace,
    Downsample,
    Middle,
    Resampling,
    SpaceToChannel,
    Stage,
    Upsample,
    average_channels,
    repeat_channels,
)
from sixfold.models.convolution import Conv2d, GroupNorm, channels_last
from sixfold.models.network import Network

Task = Literal["reconstruct", "encode", "decode", "decode_codes"]


class Encoder(nn.Module):
    """Images to the features that a bottleneck reads."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        widths, features = config.widths, config.bottleneck.feature_channels
        self.averages = features if config.resampling == "space_to_channel" else None
        self.input = Conv2d(config.channels, widths[0])
        self.stages = nn.ModuleList(self._stage(config, index) for index in range(len(widths)))
        self.middle = Middle(widths[-1], config.groups, attention=config.middle_attention)
        self.norm = GroupNorm(config.groups, widths[-1])
        self.output = Conv2d(widths[-1], features)

    @staticmethod
    def _stage(config: CodecConfig, index: int) -> Stage:
        widths, last = config.widths, len(config.widths) - 1
        resample: Resampling | None = None
        inputs = widths[max(index - 1, 0)]
        if config.resampling == "space_to_channel":
            inputs = widths[index]
            resample = SpaceToChannel(widths[index], widths[index + 1]) if index < last else None
        elif index < last:
            resample = Downsample(widths[index], widths[index])
        return Stage(
            inputs,
            widths[index],
            depth=config.depth,
            groups=config.groups,
            attention=index > last - config.attention_stages,
            resample=resample,
        )

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n features rows columns"]:
        """Encode."""
        x = self.input(channels_last(images))
        for stage in self.stages:
            x = stage(x)
        x = self.middle(x)
        features: Tensor = self.output(silu(self.norm(x)))
        return features if self.averages is None else features + average_channels(x, self.averages)

    def flops(self, pixels: float) -> float:
        """FLOPs of one image of this many pixels."""
        total, cells = _stage_flops(self.stages, pixels)
        return self.input.flops(pixels) + total + self.middle.flops(cells) + self.output.flops(cells)


class Decoder(nn.Module):
    """Latents to images."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        widths = config.widths
        self.repeats = widths[-1] if config.resampling == "space_to_channel" else None
        self.input = Conv2d(config.latent_channels, widths[-1])
        self.middle = Middle(widths[-1], config.groups, attention=config.middle_attention)
        self.stages = nn.ModuleList(self._stage(config, index) for index in reversed(range(len(widths))))
        self.norm = GroupNorm(config.groups, widths[0])
        self.output = Conv2d(widths[0], config.channels)

    @staticmethod
    def _stage(config: CodecConfig, index: int) -> Stage:
        widths, last = config.widths, len(config.widths) - 1
        resample: Resampling | None = None
        inputs = widths[min(index + 1, last)]
        if config.resampling == "space_to_channel":
            inputs = widths[index]
            resample = ChannelToSpace(widths[index], widths[index - 1]) if index > 0 else None
        elif index > 0:
            resample = Upsample(widths[index], widths[index])
        return Stage(
            inputs,
            widths[index],
            depth=config.depth + 1,
            groups=config.groups,
            attention=index > last - config.attention_stages,
            resample=resample,
        )

    def forward(self, latents: Float[Tensor, "n c rows columns"]) -> Float[Tensor, "n channels h w"]:
        """Decode."""
        x = self.input(channels_last(latents))
        if self.repeats is not None:
            x = x + repeat_channels(latents, self.repeats)
        x = self.middle(x)
        for stage in self.stages:
            x = stage(x)
        images: Tensor = self.output(silu(self.norm(x)))
        return images

    def flops(self, cells: float) -> float:
        """FLOPs of one map of this many cells."""
        total, pixels = _stage_flops(self.stages, cells)
        return self.input.flops(cells) + self.middle.flops(cells) + total + self.output.flops(pixels)


def _stage_flops(stages: nn.ModuleList, cells: float) -> tuple[float, float]:
    total = 0.0
    for stage in stages:
        assert isinstance(stage, Stage)
        flops, cells = stage.flops(cells)
        total += flops
    return total, cells


class Codec(Network):
    """Encoder, bottleneck, decoder."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        features, latents = config.bottleneck.feature_channels, config.latent_channels
        self.encoder = Encoder(config)
        self.before = Conv2d(features, features, 1) if config.latent_convolutions else None
        self.bottleneck: nn.Module = config.bottleneck.load()(config.bottleneck)
        self.after = Conv2d(latents, latents, 1) if config.latent_convolutions else None
        self.decoder = Decoder(config)

    def forward(
        self, x: Tensor, *, task: Task = "reconstruct", noise: Float[Tensor, "n c h w"] | None = None
    ) -> dict[str, Tensor]:
        """Do one of the codec's tasks; all go through here, so that sharding hooks fire.

        Args:
            x: images ``[n, channels, h, w]`` in [-1, 1] to reconstruct or encode, their sides multiples of the factor;
                latents ``[n, latent_channels, h, w]`` to decode, or codes ``[n, h, w]``.
            task: what to do.
            noise: standard normal, shaped like the latents, for a sample of the posterior instead of its mean.

        Returns:
            ``image`` where the task decodes, in [-1, 1] but not clamped; ``latents``, ``codes`` and what else the
            bottleneck returns where the task encodes.
        """
        match task:
            case "encode":
                return self._encode(x, noise)
            case "decode":
                return {"image": self._decode(x)}
            case "decode_codes":
                return {"image": self._decode(self.bottleneck.look_up(x))}  # type: ignore[operator]  # of its class
            case "reconstruct":
                encoded = self._encode(x, noise)
                return {"image": self._decode(encoded["latents"]), **encoded}

    def _encode(self, images: Float[Tensor, "n c h w"], noise: Tensor | None) -> dict[str, Tensor]:
        features = self.encoder(images)
        if self.before is not None:
            features = self.before(features)
        encoded: dict[str, Tensor] = self.bottleneck(features, noise)
        return encoded

    def _decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n channels rows columns"]:
        image: Tensor = self.decoder(latents if self.after is None else self.after(latents))
        return image.float()

    def blocks(self) -> Iterator[nn.Module]:
        """The stages and middles of encoder and decoder."""
        yield from self.encoder.stages
        yield self.encoder.middle
        yield self.decoder.middle
        yield from self.decoder.stages

    def forward_flops(self, batch_fields: dict[str, tuple[int, ...]]) -> float:
        """2 FLOPs a multiply-add of convolutions, attention, and the distances to a learned codebook."""
        n, _, height, width = batch_fields["image"]
        pixels = float(height * width)
        cells = pixels / self.config.factor**2
        total = self.encoder.flops(pixels) + self.decoder.flops(cells)
        total += sum(part.flops(cells) for part in (self.before, self.after) if part is not None)
        if self.config.bottleneck.type == "vq":
            total += 2.0 * cells * self.config.bottleneck.codes * self.config.bottleneck.channels
        return n * total
