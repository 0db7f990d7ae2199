"""Settings of the diffusion transformer (DiT, Peebles and Xie, arXiv 2212.09748)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from sixfold.models.settings import Capability, NetworkSettings, SampleLengths
from sixfold.models.settings import Field as BatchField


class DiTConfig(NetworkSettings):
    """Diffusion transformer over square images or latents, conditioned on time and, with ``classes``, on a label."""

    implementation: ClassVar[str] = "sixfold.models.dit.model:DiT"
    provides: ClassVar[frozenset[Capability]] = frozenset({"denoiser", "hidden_tokens"})

    type: Literal["dit"] = "dit"
    image_size: int = Field(ge=1, description="Height and width of the images or latents.")
    patch_size: int = Field(ge=1, description="Height and width of the square patch that makes one token.")
    channels: int = Field(ge=1, description="Channels of the images or latents, in and out.")
    width: int = Field(ge=4, description="Width of the residual stream.")
    depth: int = Field(ge=1, description="Number of blocks.")
    heads: int = Field(ge=1, description="Attention heads.")
    classes: int = Field(default=0, ge=0, description="Number of labels; 0 is unconditional.")
    mlp_ratio: float = Field(default=4.0, gt=0, description="Hidden width of the MLP over `width`.")
    qk_norm: bool = Field(default=False, description="Whether queries and keys of each head pass an RMSNorm.")
    time_scale: float = Field(
        default=1000.0, gt=0, description="Factor on the time in [0, 1] before its sinusoidal embedding."
    )
    scalars: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="Further numbers it is told, embedded like the time: interval (mean flow), guidance (LCM).",
    )
    time_frequencies: int = Field(default=256, ge=2, description="Width of the sinusoidal embedding of time.")

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
        """Tokens of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def hidden_width(self) -> int:
        """Hidden width of the MLP."""
        return int(self.width * self.mlp_ratio)

    @model_validator(mode="after")
    def _check(self) -> DiTConfig:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be divisible by patch_size, got {self.image_size} and {self.patch_size}; change one"
            )
        if self.width % self.heads:
            raise ValueError(f"width must be divisible by heads, got {self.width} and {self.heads}; change heads")
        if self.width % 4:
            raise ValueError(f"width must be a multiple of 4 (sine and cosine of two axes), got {self.width}; round it")
        if self.time_frequencies % 2:
            raise ValueError(
                f"time_frequencies must be even (sines and cosines), got {self.time_frequencies}; round it"
            )
        return self
