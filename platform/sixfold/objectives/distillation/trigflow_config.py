"""Settings of continuous-time consistency models (sCM); torch-free."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sixfold.objectives.distillation.settings import FewStepSettings
from sixfold.paths.config import LogNormalTimeConfig, TimeConfig


class TrigFlowConsistencyConfig(FewStepSettings):
    """sCM: consistency in the limit of neighbouring times, by forward-mode derivatives (Lu and Song, 2410.11081).

    With a teacher its velocity drives the trajectories (distillation), without one that of each sample (training).
    """

    implementation: ClassVar[str] = "sixfold.objectives.distillation.trigflow:TrigFlowConsistency"
    forward_mode: ClassVar[bool] = True
    type: Literal["trigflow_consistency"] = Field(
        "trigflow_consistency", description="Continuous-time consistency distillation or training (sCM)."
    )
    time: TimeConfig = Field(
        LogNormalTimeConfig(type="log_normal", mean=-1.0, std=1.4), description="Distribution of training times."
    )
    warmup_fraction: float = Field(
        0.1, ge=0, le=1, description="Part of training in which the unstable term of the tangent is faded in."
    )
    tangent_offset: float = Field(0.1, gt=0, description="c in the tangent's normalisation g / (|g| + c).")
