"""Settings of objectives that learn from the teacher's own trajectories (reflow, progressive); torch-free."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sixfold.objectives.distillation.settings import FewStepSettings
from sixfold.paths.config import TimeConfig, UniformTimeConfig


class ReflowConfig(FewStepSettings):
    """Reflow: flow matching on the teacher's own pairs of noise and data, which straightens paths (2209.03003)."""

    implementation: ClassVar[str] = "sixfold.objectives.distillation.trajectory:Reflow"
    type: Literal["reflow"] = Field("reflow", description="Flow matching on pairs that the teacher made.")
    solver_steps: int = Field(8, ge=1, le=1000, description="Heun steps by which the teacher makes a pair.")
    time: TimeConfig = Field(UniformTimeConfig(type="uniform"), description="Distribution of training times.")


class ProgressiveConfig(FewStepSettings):
    """Progressive distillation: one step of the student equals two of the teacher (2202.00512)."""

    implementation: ClassVar[str] = "sixfold.objectives.distillation.trajectory:Progressive"
    type: Literal["progressive"] = Field("progressive", description="One step of the student for two of the teacher.")
    student_steps: int = Field(
        8, ge=1, le=1024, description="Steps the student is to draw in; the teacher takes twice."
    )
