"""Settings of adversarial distillation (ADD, LADD); torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from sixfold.models.settings import Capability
from sixfold.objectives.distillation.settings import FewStepSettings
from sixfold.paths.config import LogitNormalTimeConfig, TimeConfig


class AdversarialDistillationConfig(FewStepSettings):
    """Adversarial distillation on frozen features: the teacher's own (LADD, 2403.12015), or another network's (ADD,
    2311.17042).
    """

    implementation: ClassVar[str] = "sixfold.objectives.distillation.adversarial:AdversarialDistillation"
    type: Literal["adversarial_distillation"] = Field(
        "adversarial_distillation", description="A discriminator on frozen features teaches the student (ADD, LADD)."
    )
    discriminator: str = Field("discriminator", min_length=1, description="Name in `networks` of the trained heads.")
    features: str | None = Field(
        None,
        min_length=1,
        description="Name in `networks` of frozen features that the heads read (ADD); null: the teacher's (LADD).",
    )
    read_after: tuple[int, ...] = Field(
        (), strict=False, description="Blocks of the teacher after which the heads read (LADD); one a head."
    )
    steps: int = Field(4, ge=1, le=64, description="Evenly spaced times the student is trained at; 1 is pure noise.")
    time: TimeConfig = Field(
        LogitNormalTimeConfig(type="logit_normal", mean=0.0, std=1.0),
        description="Distribution of the times at which the teacher's features are compared (LADD).",
    )
    distillation_weight: float = Field(
        2.5, ge=0, le=1000, description="Weight of the distance to the teacher's belief about a re-noised sample."
    )
    gradient_penalty: float = Field(
        0.0,
        ge=0,
        description="Weight of the change of the verdict on real samples under small noise (R1's finite difference).",
    )
    penalty_noise: float = Field(0.01, gt=0, le=1, description="Standard deviation of that noise.")
    discriminator_start: float = Field(
        0.0, ge=0, lt=1, description="Part of training before the discriminator's term reaches the student."
    )

    @property
    def needs(self) -> Mapping[str, Capability]:
        """Those of every distillation, the heads, and the features they read."""
        features: dict[str, Capability] = {} if self.features is None else {self.features: "features"}
        return {**super().needs, self.discriminator: "discriminator", **features}

    @property
    def trains(self) -> Mapping[str, str]:
        """`denoiser` and `discriminator`."""
        return {"denoiser": self.network, "discriminator": self.discriminator}
