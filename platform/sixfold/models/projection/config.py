"""Settings of the head that carries hidden tokens into another network's feature space (REPA, arXiv 2410.06940)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sixfold.models.settings import Capability, NetworkSettings


class ProjectionConfig(NetworkSettings):
    """An MLP with SiLU, applied to each token by itself."""

    implementation: ClassVar[str] = "sixfold.models.projection.model:Projection"
    provides: ClassVar[frozenset[Capability]] = frozenset({"projection"})

    type: Literal["projection"] = Field("projection", description="An MLP from hidden tokens to features.")
    input_width: int = Field(ge=1, description="Width of the tokens.")
    output_width: int = Field(ge=1, description="Channels of the features.")
    width: int = Field(2048, ge=1, description="Hidden width.")
    depth: int = Field(2, ge=1, le=16, description="Hidden layers.")
