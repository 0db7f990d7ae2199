"""Settings of the codec objective; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from sixfold.config.base import Config
from sixfold.models.settings import Capability
from sixfold.objectives.settings import Fit, ObjectiveSettings


class PerceptualLossConfig(Config):
    """Distance in the features of a frozen network."""

    network: str = Field("perceptual", min_length=1, description="Name in `networks` of the feature network.")
    weight: float = Field(1.0, ge=0, description="Weight beside the error of pixels.")


class AdversarialLossConfig(Config):
    """A discriminator that learns beside the codec (VQGAN, arXiv 2012.09841)."""

    network: str = Field("discriminator", min_length=1, description="Name in `networks` of the discriminator.")
    weight: float = Field(
        0.5,
        ge=0,
        description="Size of the term's gradient at the decoder's output over that of reconstruction, for each sample.",
    )
    from_step: int = Field(0, ge=0, description="Step from which the codec is trained against the discriminator.")
    discriminator_from_step: int = Field(0, ge=0, description="Step from which the discriminator is trained.")

    @model_validator(mode="after")
    def _discriminator_leads(self) -> AdversarialLossConfig:
        if self.discriminator_from_step > self.from_step:
            raise ValueError(
                f"the discriminator must learn before the codec learns from it, got discriminator_from_step="
                f"{self.discriminator_from_step} and from_step={self.from_step}; lower the first"
            )
        return self


class CodecObjectiveConfig(ObjectiveSettings):
    """Autoencoding: reconstruction, likeness of features, a bottleneck's own terms, and a discriminator."""

    implementation: ClassVar[str] = "sixfold.objectives.codec.objective:CodecTraining"
    fit: ClassVar[Fit] = Fit(
        modality="image",
        samplers=("reconstruction",),
        metrics=("loss",),
    )

    type: Literal["codec"] = Field("codec", description="Learn to shorten images to latents or codes and back.")
    network: str = Field("codec", min_length=1, description="Name in `networks` of the codec.")
    pixel_loss: Literal["l1", "l2"] = Field("l1", description="Error of pixels, averaged over an image.")
    kl_weight: float = Field(
        1e-6, ge=0, description="Weight of the posterior's divergence in nats, divided by the image's values (kl)."
    )
    commitment_weight: float = Field(
        0.25, ge=0, description="Weight of the latents' squared distance from their codebook vectors (vq)."
    )
    codebook_weight: float = Field(
        1.0, ge=0, description="Weight of the codebook vectors' squared distance from their latents (vq by loss)."
    )
    perceptual: PerceptualLossConfig | None = Field(None, description="Likeness of features. null: none.")
    adversarial: AdversarialLossConfig | None = Field(None, description="The discriminator. null: none.")

    @property
    def needs(self) -> Mapping[str, Capability]:
        """The codec, and the feature network and the discriminator where there are any."""
        needs: dict[str, Capability] = {self.network: "codec"}
        if self.perceptual is not None:
            needs[self.perceptual.network] = "features"
        if self.adversarial is not None:
            needs[self.adversarial.network] = "discriminator"
        return needs

    @property
    def trains(self) -> Mapping[str, str]:
        """`codec`, and `discriminator` where there is one."""
        trained = {"codec": self.network}
        return trained if self.adversarial is None else trained | {"discriminator": self.adversarial.network}
