"""Settings of networks that tell real images from made ones; torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from sixfold.models.settings import Capability, NetworkSettings, SampleLengths
from sixfold.models.settings import Field as BatchField


class PatchDiscriminatorConfig(NetworkSettings):
    """PatchGAN (pix2pix, arXiv 1611.07004): a logit for each overlapping patch of an image."""

    implementation: ClassVar[str] = "sixfold.models.discriminator.model:PatchDiscriminator"
    provides: ClassVar[frozenset[Capability]] = frozenset({"discriminator"})

    type: Literal["patch_discriminator"] = Field(
        "patch_discriminator", description="Convolutions that judge overlapping patches."
    )
    image_size: int = Field(ge=4, description="Height and width of the images it is trained on.")
    channels: int = Field(3, ge=1, description="Channels of the images.")
    width: int = Field(
        64, ge=1, description="Channels of the first layer; they double with each halving, up to eightfold."
    )
    layers: int = Field(
        3, ge=1, le=5, description="Halvings of height and width; more make a logit see a larger patch."
    )
    norm: Literal["group", "none"] = Field(
        "group", description="Normalisation between layers. None looks across samples, as batch norm would."
    )
    groups: int = Field(32, ge=1, description="Groups of channels that are normalised together.")

    @property
    def widths(self) -> list[int]:
        """Channels after each halving, and after the layer that follows them."""
        return [self.width * min(2**index, 8) for index in range(self.layers + 1)]

    def inputs(self, lengths: SampleLengths) -> Mapping[str, BatchField]:
        """Images."""
        return {"image": BatchField((self.channels, self.image_size, self.image_size), "float32")}

    @model_validator(mode="after")
    def _check(self) -> PatchDiscriminatorConfig:
        if self.patches < 1:
            raise ValueError(
                f"image_size={self.image_size} is too small for layers={self.layers}, which leave no patch to judge; "
                "lower layers"
            )
        if self.norm == "group" and (uneven := [width for width in self.widths[1:] if width % self.groups]):
            raise ValueError(
                f"groups must divide the channels of every normalised layer, got groups={self.groups} and {uneven[0]} "
                f"channels; set groups={math.gcd(*self.widths[1:])}"
            )
        return self

    @property
    def patches(self) -> int:
        """Logits along one side of an image."""
        patches: int = self.image_size // 2**self.layers - 2
        return patches
