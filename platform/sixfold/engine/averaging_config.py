"""Settings of the moving averages that are kept of a role's parameters; torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sixfold.config.base import Config


class ConstantAverageConfig(Config):
    """An exponential moving average: one decay per update."""

    type: Literal["constant"] = Field("constant", description="One decay per update.")
    decay: float = Field(
        ge=0.0,
        lt=1.0,
        description="Share of the average that stays at every update; 0.9999 is usual. It is lower in the beginning.",
    )


class PowerAverageConfig(Config):
    """Averages whose memory grows with training, from which one of any length can be reconstructed afterwards.

    Karras et al., "Analyzing and improving the training dynamics of diffusion models" (2312.02696), section 3.
    """

    type: Literal["power"] = Field("power", description="Memory in proportion to the length of training so far.")
    widths: Annotated[
        tuple[Annotated[float, Field(gt=0.0, lt=0.28)], ...], Field(strict=False, min_length=1, max_length=4)
    ] = Field(
        (0.05, 0.10),
        description="Standard deviation of each average's weights over training, relative to its length; the first is "
        "sampled and evaluated, two serve to reconstruct others.",
    )
    snapshots: bool = Field(
        True, description="Keep the averages of every checkpoint's step, for `sixfold ema` to reconstruct others from."
    )
    keep_snapshots: int | None = Field(None, ge=1, description="How many of the newest snapshots to keep; null: all.")


AverageConfig = Annotated[ConstantAverageConfig | PowerAverageConfig, Field(discriminator="type")]
