"""Settings of feature extractors and of what is done to images before them; torch-free."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from sixfold.config.base import Component, Config


class PreprocessingConfig(Config):
    """From images in [-1, 1] to what an extractor was trained on."""

    image_size: int | None = Field(
        None, ge=1, description="Height and width to resize to; null leaves images as they are."
    )
    crop: int | None = Field(
        None, ge=1, description="Height and width of the middle that is kept after the resize; null keeps all."
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        "bicubic", description="Antialiased interpolation of the resize."
    )
    colour: bool = Field(True, description="Repeat the one channel of grey images as red, green and blue.")
    rounded: bool = Field(True, description="Round to 256 levels first, as a stored picture is.")
    mean: list[float] = Field(
        [0.5], min_length=1, description="Subtracted from values in [0, 1]: one number, or one a channel."
    )
    std: list[Annotated[float, Field(gt=0.0)]] = Field(
        [0.5], min_length=1, description="Divides what is left: one number, or one a channel."
    )

    @model_validator(mode="after")
    def _same_length(self) -> PreprocessingConfig:
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"std must have as many numbers as mean, {len(self.mean)}, got {len(self.std)}; match them"
            )
        return self


class FeaturesConfig(Component):
    """Base of all feature extractors' settings.

    The implementation is called with the settings and the context in which extractors are built.
    """

    resizes: ClassVar[bool] = True
    """Whether images of any size and channels are made alike before they are looked at."""

    type: str


class ClassifierFeaturesConfig(FeaturesConfig):
    """A small classifier trained in seconds on the recipe's own training split."""

    implementation: ClassVar[str] = "sixfold.evaluation.extractors:classifier_features"
    resizes: ClassVar[bool] = False

    type: Literal["classifier"] = Field(
        "classifier", description="A small classifier trained on the recipe's own labelled training split."
    )


class PixelFeaturesConfig(FeaturesConfig):
    """The pixels themselves."""

    implementation: ClassVar[str] = "sixfold.evaluation.extractors:pixel_features"
    resizes: ClassVar[bool] = False

    type: Literal["pixel"] = Field("pixel", description="The pixels themselves.")


class CallableFeaturesConfig(FeaturesConfig):
    """Any Python function from a batch of preprocessed images to one vector each."""

    implementation: ClassVar[str] = "sixfold.evaluation.extractors:callable_features"

    type: Literal["callable"] = Field("callable", description="A Python callable from images to vectors.")
    target: str = Field(
        pattern=r"^[\w.]+:[\w.]+$",
        description="Where it stands, `module:attribute`; from [n, channels, height, width] to [n, features].",
    )
    preprocessing: PreprocessingConfig = Field(
        PreprocessingConfig(colour=False), description="What is done to images before."
    )


class TorchScriptFeaturesConfig(FeaturesConfig):
    """A network saved with ``torch.jit.save``."""

    implementation: ClassVar[str] = "sixfold.evaluation.extractors:torchscript_features"

    type: Literal["torchscript"] = Field("torchscript", description="A network saved as TorchScript.")
    path: str = Field(min_length=1, description="The file.")
    preprocessing: PreprocessingConfig = Field(PreprocessingConfig(), description="What is done to images before.")


class TimmFeaturesConfig(FeaturesConfig):
    """A timm network without its head, its weights from a local file."""

    implementation: ClassVar[str] = "sixfold.evaluation.pretrained:timm_features"

    type: Literal["timm"] = Field("timm", description="A timm network without its head.")
    model: str = Field(min_length=1, description="timm's name of the architecture.")
    path: str = Field(min_length=1, description="The file of its weights.")
    preprocessing: PreprocessingConfig = Field(PreprocessingConfig(), description="What is done to images before.")


class TransformersFeaturesConfig(FeaturesConfig):
    """A vision network of transformers (CLIP, DINOv2, ViT, ...) from a folder or the hub."""

    implementation: ClassVar[str] = "sixfold.evaluation.pretrained:transformers_features"

    type: Literal["transformers"] = Field("transformers", description="A vision network of transformers.")
    path: str = Field(min_length=1, description="The folder with its config and weights; or hf://OWNER/NAME.")
    normalized: bool = Field(False, description="Scale features to unit length, as CMMD does with CLIP's.")
    preprocessing: PreprocessingConfig | None = Field(
        None, description="What is done to images before; null: as the preprocessor_config.json beside it says."
    )


def _by_name(value: Any) -> Any:
    """A name stands for the extractor with its default settings."""
    return {"type": value} if isinstance(value, str) else value


_AnyFeatures = Annotated[
    ClassifierFeaturesConfig
    | PixelFeaturesConfig
    | CallableFeaturesConfig
    | TorchScriptFeaturesConfig
    | TimmFeaturesConfig
    | TransformersFeaturesConfig,
    Field(discriminator="type"),
]
Features = Annotated[_AnyFeatures, BeforeValidator(_by_name, json_schema_input_type=str | _AnyFeatures)]
"""Every feature extractor a recipe may name, by type alone (``pixel``) or with its settings."""
