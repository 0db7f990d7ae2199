"""What the settings of every objective that makes few-step denoisers share; torch-free.

The student is the role ``denoiser``, as in denoising itself, so that samplers, guidance and evaluation need not know
how a denoiser was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from sixfold.errors import RecipeError
from sixfold.models.settings import Capability
from sixfold.models.trained.network import TrainedNetwork
from sixfold.objectives.conditioning.config import EncodersConfig
from sixfold.objectives.denoising.config import DenoisingConfig
from sixfold.objectives.settings import Fit, ObjectiveSettings
from sixfold.paths.config import PathConfig, Prediction

DENOISER_SAMPLERS = DenoisingConfig.fit.samplers


class FewStepSettings(ObjectiveSettings):
    """Base of the settings of distillation and of one-step flows."""

    fit: ClassVar[Fit] = Fit(
        modality="image", samplers=("few_step", *DENOISER_SAMPLERS), metrics=DenoisingConfig.fit.metrics
    )

    network: str = Field("denoiser", min_length=1, description="Name in `networks` of the student.")
    teacher: str | None = Field(
        "teacher", min_length=1, description="Name in `networks` of the trained teacher; frozen. null: none."
    )
    start: Literal["teacher", "fresh"] = Field(
        "teacher",
        description="Whether the student takes over the teacher's weights (inputs of its own are added); fresh: no.",
    )
    path: PathConfig | None = Field(
        None, description="The student's path; null: that of the run it starts from, else the teacher's."
    )
    prediction: Prediction | None = Field(
        None, description="What the student's network predicts; null: as for the path."
    )
    data_std: float | None = Field(
        None, gt=0, description="Standard deviation of the data; null: as for the path. Consistency units depend on it."
    )
    encoders: EncodersConfig = Field(default_factory=dict)
    codec: str | None = Field(
        None, min_length=1, description="Name in `networks` of the trained codec whose latents the data hold; frozen."
    )
    label_drop: float = Field(0.0, ge=0, lt=1, description="Probability of replacing each condition by its null value.")
    teacher_guidance: float = Field(
        1.0, ge=0, le=100, description="Scale of classifier-free guidance of the teacher; 1 is none."
    )

    @property
    def needs(self) -> Mapping[str, Capability]:
        """The student, and the teacher, codec and text encoders where they are named."""
        needs: dict[str, Capability] = {self.network: "denoiser"}
        if self.teacher is not None:
            needs[self.teacher] = "denoiser"
        if self.codec is not None:
            needs[self.codec] = "codec"
        return needs | dict.fromkeys(self.encoders, "text_encoder")

    @property
    def trains(self) -> Mapping[str, str]:
        """The role `denoiser`; text encoders stay as the teacher knew them."""
        return {"denoiser": self.network}

    @property
    def latents_of(self) -> str | None:
        """The codec."""
        return self.codec

    def as_denoising(self, networks_config: Mapping[str, Any]) -> DenoisingConfig:
        """How the student is seen as a denoiser: its own settings, else those of the run whose weights it has.

        Raises:
            RecipeError: the teacher is missing, or neither it nor the settings say which path is meant.
        """
        source = self._source(networks_config)
        chosen = {name: getattr(self, name) for name in ("path", "prediction", "data_std")}
        given = {name: value for name, value in chosen.items() if value is not None}
        inherited = {} if source is None else {name: getattr(source, name) for name in chosen}
        own = {"network": self.network, "encoders": self.encoders, "codec": self.codec, "label_drop": self.label_drop}
        return DenoisingConfig(**{**inherited, **given, **own})

    def as_trained(self, networks_config: Mapping[str, Any]) -> DenoisingConfig:
        """The same: a student may teach in turn."""
        return self.as_denoising(networks_config)

    def teacher_as_denoising(self, networks_config: Mapping[str, Any]) -> DenoisingConfig:
        """How the teacher is seen as a denoiser.

        Raises:
            RecipeError: the teacher is no trained denoiser.
        """
        assert self.teacher is not None, "asked for where there is a teacher"
        return trained_denoising(networks_config, self.teacher)

    def _source(self, networks_config: Mapping[str, Any]) -> DenoisingConfig | None:
        for name in (self.network, self.teacher):
            if name is not None and isinstance(networks_config.get(name), TrainedNetwork):
                return trained_denoising(networks_config, name)
        return None


def trained_denoising(networks_config: Mapping[str, Any], name: str) -> DenoisingConfig:
    """Return what a trained network was trained for, seen as denoising.

    Raises:
        RecipeError: the network was not trained by another run, or not to denoise.
    """
    network = networks_config.get(name)
    found = network.objective if isinstance(network, TrainedNetwork) else None
    if not isinstance(found, DenoisingConfig):
        raise RecipeError.of(
            f"networks.{name} is to be a trained denoiser, and is "
            + ("missing" if network is None else "not one that another run trained to denoise"),
            where=f"networks.{name}",
            fix=f"set networks.{name}: {{type: trained, run: <run of a denoising recipe>}}",
        )
    return found
