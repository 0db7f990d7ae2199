"""Settings of the denoising objective; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from sixfold.models.settings import Capability
from sixfold.objectives.conditioning.config import EncodersConfig, trained_encoders
from sixfold.objectives.denoising.alignment_config import AlignmentConfig
from sixfold.objectives.settings import Fit, ObjectiveSettings
from sixfold.paths.config import (
    CouplingConfig,
    IndependentCouplingConfig,
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
        samplers=("euler", "heun", "dpm_solver", "ddim", "ancestral", "sde", "rk45"),
        metrics=("loss", "bits_per_dim", "fd", "kid", "nearest_neighbour", "conditional_accuracy"),
    )

    type: Literal["denoising"] = Field("denoising", description="Learn to undo the noise of a probability path.")
    network: str = Field("denoiser", min_length=1, description="Name in `networks` of the denoiser.")
    encoders: EncodersConfig = Field(default_factory=dict)
    codec: str | None = Field(
        None,
        min_length=1,
        description="Name in `networks` of the trained codec whose latents the data hold; frozen, it decodes samples.",
    )
    path: PathConfig = Field(RectifiedFlowConfig(), description="How data becomes noise.")
    time: TimeConfig = Field(UniformTimeConfig(), description="Distribution of training times.")
    prediction: Prediction = Field("velocity", description="What the network predicts; the loss is its squared error.")
    weighting: WeightingConfig = Field(UniformWeightingConfig(), description="Weight of the loss by noise level.")
    uncertainty: str | None = Field(
        None,
        min_length=1,
        description="Name in `networks` of a noise_uncertainty network that learns the loss at each time (EDM2).",
    )
    coupling: CouplingConfig = Field(IndependentCouplingConfig(), description="Which noise goes with which sample.")
    offset_noise: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Standard deviation of noise that all pixels of a channel share; 0.1 is usual where it is used.",
    )
    data_std: float = Field(
        0.5, gt=0, description="Standard deviation of the data, used by EDM's preconditioning and weighting alone."
    )
    label_drop: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability of replacing each condition by its null value, so that guidance can be used.",
    )

    guide: str | None = Field(
        None, min_length=1, description="Name in `networks` of a weaker, trained denoiser for autoguidance; frozen."
    )

    alignment: AlignmentConfig | None = Field(
        None, description="Alignment of a hidden block with frozen features of the clean image (REPA); null: none."
    )

    @model_validator(mode="after")
    def _aligned_with_images(self) -> DenoisingConfig:
        if self.alignment is not None and self.codec is not None:
            raise ValueError("alignment reads images, and data of codec hold latents alone; leave alignment out")
        return self

    @property
    def needs(self) -> Mapping[str, Capability]:
        """The denoiser, and whatever else is named: uncertainty, guide, codec, what alignment reads, text encoders."""
        needs: dict[str, Capability] = {self.network: "denoiser"}
        if self.uncertainty is not None:
            needs[self.uncertainty] = "uncertainty"
        if self.guide is not None:
            needs[self.guide] = "denoiser"
        if self.codec is not None:
            needs[self.codec] = "codec"
        if self.alignment is not None:
            needs |= {self.alignment.features: "features", self.alignment.projection: "projection"}
        return needs | dict.fromkeys(self.encoders, "text_encoder")

    @property
    def trains(self) -> Mapping[str, str]:
        """The roles `denoiser`, `uncertainty` and `projection` where named, and text encoders that are not frozen."""
        heads = {} if self.uncertainty is None else {"uncertainty": self.uncertainty}
        if self.alignment is not None:
            heads["projection"] = self.alignment.projection
        return {"denoiser": self.network} | heads | trained_encoders(self.encoders)

    @property
    def latents_of(self) -> str | None:
        """The codec."""
        return self.codec

    def as_denoising(self, networks_config: Mapping[str, Any]) -> DenoisingConfig:
        """How samplers see what was trained; objectives that distil have the same method."""
        return self
