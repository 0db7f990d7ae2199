"""Settings of consistency distillation and training; torch-free."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from sixfold.config.base import Config
from sixfold.objectives.distillation.settings import FewStepSettings
from sixfold.paths.config import LogNormalTimeConfig, TimeConfig


class GridPairsConfig(Config):
    """Neighbours on a grid of times (2303.01469), which may grow finer while training (2310.14189)."""

    type: Literal["grid"] = Field("grid", description="Neighbours on a grid of times of the student's path.")
    first_steps: int = Field(40, ge=1, le=10_000, description="Intervals of the grid at the beginning.")
    last_steps: int = Field(40, ge=1, le=10_000, description="Intervals at the end; doubled on the way (iCT).")
    rho: float = Field(
        1.0, ge=1, le=100, description="Times evenly spaced in their rho-th root; 7 is EDM's, 1 is even (for flows)."
    )
    normal: tuple[float, float] | None = Field(
        None,
        strict=False,
        description="Mean and standard deviation of ln(noise-to-signal ratio) that pairs are drawn by (iCT: -1.1, 2); "
        "null: all alike.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> GridPairsConfig:
        if self.first_steps > self.last_steps:
            raise ValueError(
                f"expected first_steps <= last_steps, got {self.first_steps} and {self.last_steps}; swap them"
            )
        return self


class ContinuousPairsConfig(Config):
    """r = t - t q^-(stage + 1) (1 + k sigmoid(-t)) in noise-to-signal ratios, at least 0 (ECT, 2406.14548)."""

    type: Literal["continuous"] = Field("continuous", description="Any time, its partner ever nearer.")
    time: TimeConfig = Field(
        LogNormalTimeConfig(type="log_normal", mean=-1.1, std=2.0), description="Distribution of the noisier time."
    )
    stages: int = Field(8, ge=1, le=64, description="How often the distance shrinks during training.")
    factor: float = Field(2.0, gt=1, le=1024, description="By how much it shrinks each time (q).")
    boost: float = Field(8.0, ge=0, le=100, description="Extra distance where there is little noise (k).")


PairsConfig = Annotated[GridPairsConfig | ContinuousPairsConfig, Field(discriminator="type")]


class ConsistencyConfig(FewStepSettings):
    """Consistency models: two points of one trajectory must lead to the same data (Song et al., 2303.01469).

    With a teacher its ODE solver makes the less noisy point (distillation); without, both points share data and noise
    (training, iCT 2310.14189, ECT 2406.14548).
    """

    implementation: ClassVar[str] = "sixfold.objectives.distillation.consistency:Consistency"
    type: Literal["consistency"] = Field("consistency", description="Consistency distillation or training.")
    pairs: PairsConfig = Field(GridPairsConfig(), description="Which two noise levels are compared.")
    solver: Literal["euler", "heun"] = Field("heun", description="The teacher's step from one point to the other.")
    target_decay: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Decay of the average of the student that makes targets; null: the student itself.",
    )
    huber: float | None = Field(
        None,
        gt=0,
        description="c of sqrt(|.|^2 + d c^2) - sqrt(d) c over d dimensions (iCT: .00054); null: squared error.",
    )
    elementwise: bool = Field(
        False, description="Huber's distance of each dimension by itself, sqrt(.^2 + c^2) - c, and the mean (LCM)."
    )
    cauchy: float | None = Field(
        None,
        gt=0,
        description="c of log(1 + |.|^2 / (2 d c^2)) over d dimensions, for latents (2502.01441); null: not.",
    )
    weighting: Literal["uniform", "inverse_gap"] = Field(
        "uniform", description="inverse_gap divides by the difference of the two times (iCT)."
    )
    embed_guidance: tuple[float, float] | None = Field(
        None,
        strict=False,
        description="Guide the teacher by scales uniform in this range and tell the student which (LCM, 2310.04378).",
    )

    @model_validator(mode="after")
    def _one_distance(self) -> ConsistencyConfig:
        if self.cauchy is not None and self.huber is not None:
            raise ValueError(f"expected huber or cauchy, got {self.huber} and {self.cauchy}; set one of them to null")
        if self.elementwise and self.huber is None:
            raise ValueError("elementwise is of Huber's distance, and huber is null; set huber (LCM: 0.001)")
        return self
