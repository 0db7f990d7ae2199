"""Settings of the denoising objective; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from sixfold.models.settings import Capability
from sixfold.objectives.settings import Fit, ObjectiveSettings
from sixfold.paths.config import (
    PathConfig,
    Prediction,
    RectifiedFlowConfig,
    TimeConfig,
    UniformTimeConfig,
    UniformWeightingConfig,
    WeightingConfig,
)


class DenoisingConfig(ObjectiveSettings):
    """Diffusion and flow matching: path x prediction x time distribution x weighting."""

    implementation: ClassVar[str] = "sixfold.objectives.denoising.objective:Denoising"
    fit: ClassVar[Fit] = Fit(
        modality="image",
        samplers=("euler", "heun"),
        metrics=("loss", "fd", "kid", "nearest_neighbour", "conditional_accuracy"),
    )

    type: Literal["denoising"] = Field("denoising", description="Learn to undo the noise of a probability path.")
    network: str = Field("denoiser", min_length=1, description="Name in `networks` of the denoiser.")
    path: PathConfig = Field(RectifiedFlowConfig(), description="How data becomes noise.")
    time: TimeConfig = Field(UniformTimeConfig(), description="Distribution of training times.")
    prediction: Prediction = Field("velocity", description="What the network predicts; the loss is its squared error.")
    weighting: WeightingConfig = Field(UniformWeightingConfig(), description="Weight of the loss by noise level.")
    data_std: float = Field(
        0.5, gt=0, description="Standard deviation of the data, used by EDM's preconditioning and weighting alone."
    )
    label_drop: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability of replacing each condition by its null value, so that guidance can be used.",
    )

    @property
    def needs(self) -> Mapping[str, Capability]:
        """The denoiser."""
        return {self.network: "denoiser"}

    @property
    def trains(self) -> Mapping[str, str]:
        """One role, `denoiser`."""
        return {"denoiser": self.network}
