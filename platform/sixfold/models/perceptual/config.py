"""Settings of frozen networks whose features tell how alike two images look; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from sixfold.models.settings import Capability, NetworkSettings, SampleLengths
from sixfold.models.settings import Field as BatchField


class ClassifierConfig(NetworkSettings):
    """A small classifier, trained on the recipe's own training split before the run begins."""

    implementation: ClassVar[str] = "sixfold.models.perceptual.classifier:Classifier"
    provides: ClassVar[frozenset[Capability]] = frozenset({"features"})
    weights_from: ClassVar[str | None] = "sixfold.models.perceptual.classifier:trained_weights"

    type: Literal["classifier"] = Field(
        "classifier", description="A small classifier trained on the recipe's own training split."
    )
    image_size: int = Field(ge=4, description="Height and width of the images.")
    channels: int = Field(3, ge=1, description="Channels of the images.")
    classes: int = Field(ge=2, description="How many labels the data have.")
    width: int = Field(24, ge=1, description="Channels of the first convolution; the others have twice as many.")
    features: int = Field(64, ge=1, description="Length of the embedding.")
    steps: int = Field(300, ge=1, description="Steps of its training.")
    seed: int = Field(1, ge=0, description="Seed of its weights and batches.")

    def inputs(self, lengths: SampleLengths) -> Mapping[str, BatchField]:
        """Images."""
        return {"image": BatchField((self.channels, self.image_size, self.image_size), "float32")}


class LPIPSConfig(NetworkSettings):
    """The features of LPIPS (arXiv 1801.03924): VGG-16's, normalised and weighted channel by channel."""

    implementation: ClassVar[str] = "sixfold.models.perceptual.vgg:LPIPSFeatures"
    provides: ClassVar[frozenset[Capability]] = frozenset({"features"})
    weights_from: ClassVar[str | None] = "sixfold.models.perceptual.vgg:read_weights"

    type: Literal["lpips"] = Field("lpips", description="VGG-16 features weighted as people judge likeness.")
    vgg: str = Field(
        min_length=1,
        description="File with torchvision's VGG-16 weights: .pth (read without free pickle) or .safetensors.",
    )
    weights: str | None = Field(
        None,
        min_length=1,
        description="File with LPIPS's channel weights (vgg.pth of its authors); null weighs channels alike.",
    )
