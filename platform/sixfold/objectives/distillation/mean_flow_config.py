"""Settings of MeanFlow; torch-free."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sixfold.objectives.distillation.settings import FewStepSettings
from sixfold.paths.config import LogitNormalTimeConfig, TimeConfig


class MeanFlowConfig(FewStepSettings):
    """MeanFlow: the average velocity over an interval of time, learnt from an identity (Geng et al., 2505.13447).

    Without a teacher it trains from scratch on each sample's own velocity, with one on the teacher's.
    """

    implementation: ClassVar[str] = "sixfold.objectives.distillation.mean_flow:MeanFlow"
    forward_mode: ClassVar[bool] = True
    jumps: ClassVar[Literal["data", "interval"]] = "interval"

    type: Literal["mean_flow"] = Field("mean_flow", description="Average velocities over intervals (MeanFlow).")
    teacher: str | None = Field(
        None, min_length=1, description="Name in `networks` of a trained teacher; frozen. null: from scratch."
    )
    time: TimeConfig = Field(
        LogitNormalTimeConfig(type="logit_normal", mean=-0.4, std=1.0),
        description="Distribution of both ends of the interval, drawn independently and put in order.",
    )
    instantaneous_fraction: float = Field(
        0.75, ge=0, le=1, description="Part of the samples whose interval is empty: plain flow matching."
    )
    guidance: float = Field(
        1.0, ge=0, le=100, description="Scale of guidance that is trained in, where there is no teacher; 1 is none."
    )
    weight_power: float = Field(1.0, ge=0, le=2, description="p in the adaptive weight 1 / (error + c)^p.")
    weight_offset: float = Field(0.01, gt=0, description="c in the adaptive weight.")
