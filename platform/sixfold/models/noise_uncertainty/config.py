"""Settings of the network that learns how large a denoiser's loss is at each noise level."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sixfold.models.settings import Capability, NetworkSettings


class NoiseUncertaintyConfig(NetworkSettings):
    """The log of a denoiser's expected loss, as a function of the noise level (EDM2, 2312.02696, section 4.1)."""

    implementation: ClassVar[str] = "sixfold.models.noise_uncertainty.model:NoiseUncertainty"
    provides: ClassVar[frozenset[Capability]] = frozenset({"uncertainty"})

    type: Literal["noise_uncertainty"] = "noise_uncertainty"
    frequencies: int = Field(
        default=32, ge=1, le=1024, description="Cosines over the log of the noise-to-signal ratio."
    )
