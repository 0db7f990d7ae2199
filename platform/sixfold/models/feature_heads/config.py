"""Settings of discriminator heads on the hidden tokens of a frozen network (LADD, arXiv 2403.12015)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sixfold.models.settings import Capability, NetworkSettings


class FeatureHeadsConfig(NetworkSettings):
    """One small head for each layer of features; every token gets a verdict."""

    implementation: ClassVar[str] = "sixfold.models.feature_heads.model:FeatureHeads"
    provides: ClassVar[frozenset[Capability]] = frozenset({"discriminator"})

    type: Literal["feature_heads"] = "feature_heads"
    heads: int = Field(ge=1, description="Layers of features that are read.")
    features: int = Field(ge=1, description="Width of the tokens that are read.")
    width: int = Field(default=64, ge=1, description="Hidden width of each head.")
    depth: int = Field(default=2, ge=1, le=16, description="Hidden layers of each head.")
