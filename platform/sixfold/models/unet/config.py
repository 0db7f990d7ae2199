"""Settings of the convolutional U-Net (ADM; Dhariwal and Nichol, 2105.05233)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from sixfold.models.settings import Capability, NetworkSettings, SampleLengths
from sixfold.models.settings import Field as BatchField


class UNetConfig(NetworkSettings):
    """Convolutional U-Net over square images or latents, conditioned on time and, with ``classes``, on a label."""

    implementation: ClassVar[str] = "sixfold.models.unet.model:UNet"
    provides: ClassVar[frozenset[Capability]] = frozenset({"denoiser"})

    type: Literal["unet"] = "unet"
    image_size: int = Field(ge=1, description="Height and width of the images or latents.")
    channels: int = Field(ge=1, description="Channels of the images or latents, in and out.")
    width: int = Field(ge=4, description="Channels at full resolution, times the first multiplier.")
    multipliers: list[Annotated[int, Field(ge=1)]] = Field(
        default=[1, 2, 3, 4],
        min_length=1,
        description="Channels of each level over `width`; each level halves the size.",
    )
    blocks_per_level: int = Field(default=2, ge=1, description="Residual blocks of a level on the way down.")
    attention_sizes: list[int] = Field(default=[16, 8], description="Heights of the levels that have attention.")
    head_width: int = Field(default=64, ge=1, description="Channels of one attention head.")
    groups: int = Field(default=32, ge=1, description="Groups of channels that are normalised together.")
    classes: int = Field(default=0, ge=0, description="Number of labels; 0 is unconditional.")
    time_scale: float = Field(
        default=1000.0, gt=0, description="Factor on the time in [0, 1] before its sinusoidal embedding."
    )
    time_frequencies: int = Field(default=256, ge=2, multiple_of=2, description="Width of the embedding's sinusoids.")

    @property
    def null_values(self) -> dict[str, int]:
        """The value of each condition that stands for its absence (label drop, guidance)."""
        return {"label": self.classes} if self.classes else {}

    def inputs(self, lengths: SampleLengths) -> dict[str, BatchField]:
        """Images, and labels where there are classes."""
        image = BatchField((self.channels, self.image_size, self.image_size), "float32")
        return {"image": image} | ({"label": BatchField((), "int64")} if self.classes else {})

    @property
    def tokens(self) -> int:
        """Pixels of one image."""
        return self.image_size**2

    @property
    def embedding_width(self) -> int:
        """Width of the embedded condition."""
        return 4 * self.width

    @property
    def sizes(self) -> list[int]:
        """Height of the images at each level."""
        return [self.image_size >> level for level in range(len(self.multipliers))]

    @property
    def level_channels(self) -> list[int]:
        """Channels of each level."""
        return [self.width * multiplier for multiplier in self.multipliers]

    @model_validator(mode="after")
    def _check(self) -> UNetConfig:
        halvings = len(self.multipliers) - 1
        if self.image_size % 2**halvings:
            raise ValueError(
                f"{len(self.multipliers)} levels need an image_size divisible by {2**halvings}, got {self.image_size}; "
                "shorten multipliers"
            )
        if uneven := [channels for channels in self.level_channels if channels % self.groups]:
            raise ValueError(
                f"groups must divide every level's channels, got {self.groups} and {uneven}; change groups"
            )
        strange = [size for size in self.attention_sizes if size not in self.sizes]
        if strange:
            raise ValueError(
                f"attention_sizes must be among the levels' heights {self.sizes}, got {strange}; remove them"
            )
        attending = {c for c, size in zip(self.level_channels, self.sizes, strict=True) if size in self.attention_sizes}
        if odd := sorted(c for c in attending | {self.level_channels[-1]} if c % self.head_width):
            raise ValueError(
                f"head_width must divide the channels of levels with attention, got {self.head_width} and {odd}; "
                "change head_width"
            )
        return self
