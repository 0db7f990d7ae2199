"""Settings of distribution matching distillation (DMD2); torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from sixfold.models.settings import Capability
from sixfold.objectives.distillation.settings import FewStepSettings


class DistributionMatchingConfig(FewStepSettings):
    """DMD2: the student's samples follow the teacher's distribution, by the difference of two scores (2405.14867).

    Roles: `denoiser` (the student), `fake_score` (learns the student's own distribution), `teacher`, and, where
    `discriminator` is named, a head on the fake score's features.
    """

    implementation: ClassVar[str] = "sixfold.objectives.distillation.distribution_matching:DistributionMatching"
    type: Literal["distribution_matching"] = Field(
        "distribution_matching", description="Match the teacher's distribution by two scores (DMD2)."
    )
    fake_updates: int = Field(5, ge=1, le=100, description="Updates of the fake score for each of the student's.")
    steps: int = Field(1, ge=1, le=64, description="Steps in which the student draws; each is trained alike.")
    noise_range: tuple[float, float] = Field(
        (0.02, 0.98), strict=False, description="Part of the path's times at which distributions are compared."
    )
    discriminator: str | None = Field(
        None, min_length=1, description="Name in `networks` of heads on the fake score's features; null: none."
    )
    read_after: tuple[int, ...] = Field(
        (), strict=False, description="Blocks of the fake score after which the heads read; one a head."
    )
    student_weight: float = Field(3e-3, ge=0, description="Weight of the adversarial term in the student's loss.")
    discriminator_weight: float = Field(1e-2, ge=0, description="Weight of the heads' loss beside the fake score's.")

    @property
    def needs(self) -> Mapping[str, Capability]:
        """Those of every distillation, and the heads."""
        heads: dict[str, Capability] = {} if self.discriminator is None else {self.discriminator: "discriminator"}
        return {**super().needs, **heads}

    @property
    def trains(self) -> Mapping[str, str]:
        """`denoiser`, `fake_score` and, where it is named, `discriminator`."""
        assert self.teacher is not None, "the recipe's checks ask for a teacher"
        heads = {} if self.discriminator is None else {"discriminator": self.discriminator}
        return {"denoiser": self.network, "fake_score": self.teacher, **heads}
