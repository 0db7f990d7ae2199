"""Settings of the multimodal diffusion transformer (MMDiT; Esser et al., "Stable Diffusion 3", arXiv 2403.03206)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from sixfold.models.settings import Capability, NetworkSettings, SampleLengths
from sixfold.models.settings import Field as BatchField


class MMDiTConfig(NetworkSettings):
    """Diffusion transformer with weights of their own for image and text tokens, which attend to one another.

    It reads what text encoders make: a sequence of features, and pooled features that join the time.
    """

    implementation: ClassVar[str] = "sixfold.models.mmdit.model:MMDiT"
    provides: ClassVar[frozenset[Capability]] = frozenset({"denoiser", "hidden_tokens"})
    reads_text: ClassVar[bool] = True

    type: Literal["mmdit"] = "mmdit"
    image_size: int = Field(ge=1, description="Height and width of the images or latents.")
    patch_size: int = Field(ge=1, description="Height and width of the square patch that makes one token.")
    channels: int = Field(ge=1, description="Channels of the images or latents, in and out.")
    width: int = Field(ge=4, description="Width of both residual streams; SD3 takes 64 times the depth.")
    depth: int = Field(ge=1, description="Number of blocks.")
    heads: int = Field(ge=1, description="Attention heads; SD3 takes as many as blocks.")
    text_tokens: int = Field(ge=1, description="Text tokens that the encoders give together.")
    text_width: int = Field(ge=1, description="Features of a text token as the encoders give them.")
    pooled_width: int = Field(ge=0, description="Features of the pooled text; 0: the time alone modulates.")
    mlp_ratio: float = Field(default=4.0, gt=0, description="Hidden width of each MLP over `width`.")
    qk_norm: bool = Field(default=True, description="Whether queries and keys of each head pass an RMSNorm.")
    position_grid: int | None = Field(
        default=None,
        ge=1,
        description="Patches a side of the grid of positions, scaled to `image_size`, of which each image takes the "
        "middle (for several aspect ratios); null: the image's own grid.",
    )
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
        """None of its own: what stands for no text is the encoders' affair."""
        return {}

    def inputs(self, lengths: SampleLengths) -> dict[str, BatchField]:
        """Images; text comes from encoders."""
        return {"image": BatchField((self.channels, self.image_size, self.image_size), "float32")}

    @property
    def grid(self) -> int:
        """Patches a side of an image of ``image_size``."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens of one image of ``image_size`` and of its text."""
        return self.grid**2 + self.text_tokens

    @property
    def largest_side(self) -> int:
        """Most pixels of a side of an image that fits the grid of positions."""
        return self.patch_size * (self.position_grid or self.grid)

    @property
    def hidden_width(self) -> int:
        """Hidden width of the MLPs."""
        return int(self.width * self.mlp_ratio)

    @model_validator(mode="after")
    def _check(self) -> MMDiTConfig:
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
        if self.position_grid is not None and self.position_grid < self.grid:
            raise ValueError(
                f"position_grid must hold the {self.grid} patches a side of image_size, got {self.position_grid}; "
                "raise it"
            )
        return self
