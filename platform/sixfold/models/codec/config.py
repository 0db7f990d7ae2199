"""Settings of convolutional autoencoders that make latents or codes of images; torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from sixfold.config.base import Component
from sixfold.models.settings import Capability, NetworkSettings, SampleLengths
from sixfold.models.settings import Field as BatchField


class KLConfig(Component):
    """A Gaussian posterior kept near the standard normal (variational autoencoder, arXiv 1312.6114)."""

    implementation: ClassVar[str] = "sixfold.models.codec.bottlenecks:KLBottleneck"
    type: Literal["kl"] = Field("kl", description="Continuous latents: a mean and a log-variance each.")
    channels: int = Field(16, ge=1, description="Channels of the latents.")

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that the decoder reads."""
        return self.channels

    @property
    def feature_channels(self) -> int:
        """Channels the encoder makes: means and log-variances."""
        return 2 * self.channels

    @property
    def codebook_size(self) -> int | None:
        """How many codes there are; None where latents are continuous."""
        return None


class VQConfig(Component):
    """The nearest of a learned set of vectors (vector quantisation, arXiv 1711.00937)."""

    implementation: ClassVar[str] = "sixfold.models.codec.vector_quantizer:VectorQuantizer"
    type: Literal["vq"] = Field("vq", description="Discrete latents: the nearest vector of a learned codebook.")
    channels: int = Field(8, ge=1, description="Channels of the latents: the length of a codebook vector.")
    codes: int = Field(1024, ge=2, description="Vectors in the codebook.")
    codebook: Literal["ema", "loss"] = Field(
        "ema",
        description="How the codebook learns: as moving averages of the latents assigned to each code, or by a loss.",
    )
    decay: float = Field(0.99, ge=0, lt=1, description="Decay of the moving averages, per optimizer step (ema).")
    revive_below: float = Field(
        0.03,
        ge=0,
        description="A code whose share of latents falls below this fraction of an even share is moved to a latent of "
        "the batch (ema); 0 never moves one.",
    )

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that the decoder reads."""
        return self.channels

    @property
    def feature_channels(self) -> int:
        """Channels the encoder makes."""
        return self.channels

    @property
    def codebook_size(self) -> int | None:
        """How many codes there are."""
        return self.codes


class FSQConfig(Component):
    """Each channel rounded to a few levels (finite scalar quantisation, arXiv 2309.15505)."""

    implementation: ClassVar[str] = "sixfold.models.codec.bottlenecks:FSQBottleneck"
    type: Literal["fsq"] = Field("fsq", description="Discrete latents: every channel rounded to a few levels.")
    levels: list[Annotated[int, Field(ge=2)]] = Field(
        [8, 5, 5, 5], min_length=1, description="Levels of each channel; their product is the number of codes."
    )

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that the decoder reads."""
        return len(self.levels)

    @property
    def feature_channels(self) -> int:
        """Channels the encoder makes."""
        return len(self.levels)

    @property
    def codebook_size(self) -> int | None:
        """How many codes there are."""
        return math.prod(self.levels)


BottleneckConfig = Annotated[KLConfig | VQConfig | FSQConfig, Field(discriminator="type")]


class CodecConfig(NetworkSettings):
    """Convolutional encoder and decoder around a bottleneck; each stage but the first halves height and width.

    With ``strided`` resampling this is the autoencoder of latent diffusion (arXiv 2112.10752), with
    ``space_to_channel`` shortcuts one for deep compression (arXiv 2410.10733).
    """

    implementation: ClassVar[str] = "sixfold.models.codec.model:Codec"
    provides: ClassVar[frozenset[Capability]] = frozenset({"codec"})

    type: Literal["codec"] = Field("codec", description="A convolutional autoencoder.")
    image_size: int = Field(ge=1, description="Height and width of the images it is trained on.")
    channels: int = Field(3, ge=1, description="Channels of the images, in and out.")
    width: int = Field(128, ge=1, description="Channels of the first stage.")
    multipliers: list[Annotated[int, Field(ge=1)]] = Field(
        [1, 2, 4, 4],
        min_length=1,
        description="Channels of each stage over `width`; there is one halving fewer than stages.",
    )
    depth: int = Field(2, ge=1, description="Residual blocks in a stage of the encoder; the decoder has one more.")
    attention_stages: int = Field(
        0, ge=0, description="How many of the smallest stages attend after each residual block."
    )
    middle_attention: bool = Field(True, description="Whether the blocks at the smallest resolution attend.")
    groups: int = Field(32, ge=1, description="Groups of channels that are normalised together.")
    resampling: Literal["strided", "space_to_channel"] = Field(
        "strided",
        description="How stages change resolution: by convolution, or with shortcuts that move pixels into channels.",
    )
    latent_convolutions: bool = Field(
        False, description="Whether 1x1 convolutions stand before and after the bottleneck."
    )
    bottleneck: BottleneckConfig = Field(KLConfig(), description="What latents are.")

    def inputs(self, lengths: SampleLengths) -> Mapping[str, BatchField]:
        """Images."""
        return {"image": BatchField((self.channels, self.image_size, self.image_size), "float32")}

    @property
    def factor(self) -> int:
        """Pixels along one side of an image for each latent along it."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.bottleneck.latent_channels

    @property
    def latent_size(self) -> int:
        """Height and width of the latents of a training image."""
        return self.image_size // self.factor

    @property
    def codebook_size(self) -> int | None:
        """How many codes there are; None where latents are continuous."""
        return self.bottleneck.codebook_size

    @property
    def values(self) -> int:
        """Numbers that stand for a training image: latents, or codes where the bottleneck is discrete."""
        return self.latent_size**2 * (1 if self.codebook_size else self.latent_channels)

    @property
    def widths(self) -> list[int]:
        """Channels of each stage."""
        return [self.width * multiplier for multiplier in self.multipliers]

    @model_validator(mode="after")
    def _check(self) -> CodecConfig:
        if self.image_size % self.factor:
            nearest = max(self.factor, round(self.image_size / self.factor) * self.factor)
            raise ValueError(
                f"image_size must be divisible by {self.factor}, since {len(self.multipliers)} stages halve it "
                f"{len(self.multipliers) - 1} times, got {self.image_size}; set image_size={nearest} or drop a stage"
            )
        if uneven := [width for width in self.widths if width % self.groups]:
            raise ValueError(
                f"groups must divide the channels of every stage, got groups={self.groups} and {uneven[0]} channels; "
                f"set groups={math.gcd(*self.widths)}"
            )
        if self.resampling == "space_to_channel":
            self._check_shortcuts()
        return self

    def _check_shortcuts(self) -> None:
        """Shortcuts average or repeat whole groups of channels."""
        widths = self.widths
        for fine, coarse in pairwise(widths):
            if (4 * fine) % coarse:
                raise ValueError(
                    f"space_to_channel shortcuts need four times a stage's channels to be a multiple of the next "
                    f"stage's, got {fine} and {coarse}; change multipliers"
                )
        if widths[-1] % self.bottleneck.feature_channels or widths[-1] % self.latent_channels:
            raise ValueError(
                f"space_to_channel shortcuts need the last stage's channels to be a multiple of what the bottleneck "
                f"takes and gives, got {widths[-1]} for {self.bottleneck.feature_channels} and {self.latent_channels}; "
                "change width or the bottleneck's channels"
            )
