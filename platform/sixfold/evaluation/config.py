"""Settings of evaluation, in the loop and by command; torch-free.

A new metric is one module with its class, its settings below, and its place in :data:`Metric`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from sixfold.config.base import Component, Config
from sixfold.config.schema import Slot
from sixfold.evaluation.extractor_config import ClassifierFeaturesConfig, Features, FeaturesConfig

Need = Literal["samples", "labels", "captions", "features"]
"""What a metric works from besides held-out data: drawn samples, their conditions, a feature extractor."""


class MetricConfig(Config):
    """Base of every metric's settings."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    """Empty for what the objective itself measures on held-out data."""

    type: str


class SampleMetricConfig(MetricConfig, Component):
    """Base of the settings of metrics that score drawn images.

    Implementations follow :class:`sixfold.evaluation.contract.SampleMetric`.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"samples"})
    modality: ClassVar[Literal["image", "text"]] = "image"
    """What the samples must be."""


class HeldOutMetricConfig(MetricConfig, Component):
    """Base of metrics of held-out data that the objective does not measure itself.

    Implementations are made as ``implementation(settings, objective, networks)`` from configs and called as
    ``metric(nets, batch, random)``, on every rank, for sums like those of an objective's ``evaluate``.
    """


class BitsPerDimConfig(HeldOutMetricConfig):
    """Bits per dimension of held-out images under the probability flow of a denoiser."""

    implementation: ClassVar[str] = "sixfold.evaluation.likelihood:BitsPerDimMetric"

    type: Literal["bits_per_dim"] = Field(
        "bits_per_dim", description="Held-out bits a pixel and channel, by the flow's likelihood (costly)."
    )
    rtol: float = Field(1e-3, gt=0, le=0.1, description="Tolerated error of a solver's step, relative.")
    atol: float = Field(1e-3, gt=0, le=0.1, description="Tolerated error of a solver's step, in units of the data.")
    exact_dimensions: int = Field(16, ge=0, description="Up to so many dimensions the divergence is exact.")
    probes: int = Field(1, ge=1, le=1000, description="Random directions of its estimate beyond.")


class LossConfig(MetricConfig):
    """The objective's loss on held-out data."""

    type: Literal["loss"] = Field("loss", description="The objective's loss on held-out data.")


class BitsPerByteConfig(MetricConfig):
    """Held-out cross-entropy per byte of source."""

    type: Literal["bits_per_byte"] = Field("bits_per_byte", description="Held-out cross-entropy per byte of source.")


class FeatureMetricConfig(SampleMetricConfig):
    """Base of metrics that compare features of samples with features of training images."""

    needs: ClassVar[frozenset[Need]] = frozenset({"samples", "features"})

    features: Features | None = Field(
        None, description="Feature space of this metric alone; null for evaluation.features."
    )


class FrechetConfig(FeatureMetricConfig):
    """Frechet distance between Gaussians fitted to features: "FID" with the original Inception network."""

    implementation: ClassVar[str] = "sixfold.evaluation.frechet:FrechetMetric"

    type: Literal["fd"] = Field("fd", description="Frechet distance between Gaussians fitted to features.")
    half_splits: int = Field(
        4,
        ge=0,
        le=100,
        description="Random halvings of the training split whose mean distance fd_ratio divides by; 0 for no fd_ratio.",
    )


class KernelInceptionConfig(FeatureMetricConfig):
    """Unbiased squared MMD under a cubic kernel: "KID" with the original Inception network."""

    implementation: ClassVar[str] = "sixfold.evaluation.kernel_distance:KernelMetric"

    type: Literal["kid"] = Field("kid", description="Unbiased squared MMD under the kernel (x.y / d + 1)^3.")


class CMMDConfig(FeatureMetricConfig):
    """Squared MMD under a Gaussian kernel, times 1000: "CMMD" with CLIP's normalised features."""

    implementation: ClassVar[str] = "sixfold.evaluation.kernel_distance:KernelMetric"

    type: Literal["cmmd"] = Field("cmmd", description="1000 x squared MMD under a Gaussian kernel.")
    bandwidth: float = Field(10.0, gt=0.0, description="Sigma of the kernel exp(-|x - y|^2 / (2 sigma^2)).")


class PrecisionRecallConfig(FeatureMetricConfig):
    """Shares of samples within the data's manifold, and of data within the samples'."""

    implementation: ClassVar[str] = "sixfold.evaluation.manifolds:PrecisionRecallMetric"

    type: Literal["precision_recall"] = Field(
        "precision_recall", description="Share of samples near the data, and of data near samples."
    )
    neighbours: int = Field(3, ge=1, description="Neighbour whose distance is the radius of a point's ball.")


class DensityCoverageConfig(FeatureMetricConfig):
    """Precision and recall made robust: how many data balls hold a sample, how many data have a sample in theirs."""

    implementation: ClassVar[str] = "sixfold.evaluation.manifolds:DensityCoverageMetric"

    type: Literal["density_coverage"] = Field(
        "density_coverage",
        description="Mean number of data balls around a sample, and share of data balls that hold one.",
    )
    neighbours: int = Field(5, ge=1, description="Neighbour whose distance is the radius of a point's ball.")


class NearestNeighbourConfig(SampleMetricConfig):
    """Memorisation: distance to the nearest training image, over that of held-out images."""

    implementation: ClassVar[str] = "sixfold.evaluation.nearest_neighbour:NearestNeighbourMetric"

    type: Literal["nearest_neighbour"] = Field(
        "nearest_neighbour",
        description="Distance in pixels to the nearest training image, over that of held-out images.",
    )


class ConditionalAccuracyConfig(SampleMetricConfig):
    """How often a classifier of the training split finds the class that was asked for."""

    implementation: ClassVar[str] = "sixfold.evaluation.conditional_accuracy:ConditionalAccuracyMetric"
    needs: ClassVar[frozenset[Need]] = frozenset({"samples", "labels"})

    type: Literal["conditional_accuracy"] = Field(
        "conditional_accuracy", description="Share of samples that a classifier puts in the class asked for."
    )


class PromptAlignmentConfig(SampleMetricConfig):
    """How often a picture shows what its caption says, where a function can read the picture."""

    implementation: ClassVar[str] = "sixfold.evaluation.prompt_alignment:PromptAlignmentMetric"
    needs: ClassVar[frozenset[Need]] = frozenset({"samples", "captions"})

    type: Literal["prompt_alignment"] = Field(
        "prompt_alignment", description="Share of samples that show all that their caption says, and by attribute."
    )
    reader: str = Field(
        "sixfold_data.scene_reading:read_agreement",
        pattern=r"^[\w.]+:\w+$",
        description="Function, as module:name, from images [n, c, h, w] and captions to what is right in each, by "
        "name; all that counts under the name aligned.",
    )


def _by_name(value: Any) -> Any:
    """A name stands for the metric with its default settings."""
    return {"type": value} if isinstance(value, str) else value


_AnyMetric = Annotated[
    LossConfig
    | BitsPerByteConfig
    | BitsPerDimConfig
    | FrechetConfig
    | KernelInceptionConfig
    | CMMDConfig
    | PrecisionRecallConfig
    | DensityCoverageConfig
    | NearestNeighbourConfig
    | ConditionalAccuracyConfig
    | PromptAlignmentConfig,
    Field(discriminator="type"),
]
Metric = Annotated[_AnyMetric, BeforeValidator(_by_name, json_schema_input_type=str | _AnyMetric)]
"""Every metric a recipe may name: by its type alone (``fd``) or with settings (``{type: fd, half_splits: 0}``)."""


def metric_types(*, needing_samples_of: str) -> list[str]:
    """The types of all metrics that score samples of a modality (``image`` or ``text``)."""
    kinds = Slot(list[Metric]).entry()
    assert kinds is not None
    return [
        kind
        for kind, settings in kinds.kinds().items()
        if issubclass(settings, SampleMetricConfig) and settings.modality == needing_samples_of
    ]


class EvaluationConfig(Config):
    """What is measured, how often, and on how many samples."""

    every_steps: int | None = Field(
        None, ge=1, description="Optimizer steps between evaluations; null for the end only."
    )
    metrics: list[Metric] = Field(
        [LossConfig()], description="What to measure: names, or sections where a metric's settings differ."
    )
    samples: Annotated[int, Field(ge=2)] | Literal["split"] = Field(
        "split",
        description="Samples to draw for metrics of samples, at least 2; `split`: as many as the training split has.",
    )
    conditions: Literal["training", "held_out"] = Field(
        "training",
        description="Split whose labels and captions samples are drawn for, from its first on, round and round.",
    )
    held_out_samples: int | None = Field(
        None,
        ge=1,
        description="Held-out samples that loss and bits per byte are measured on; null for the whole split.",
    )
    batch: int = Field(256, ge=1, description="Samples in one forward pass, on each rank.")
    features: Features = Field(
        ClassifierFeaturesConfig(),
        description="Feature space of samples and training images: a type, or a section with its settings.",
    )
    reference: str | None = Field(
        None,
        description="Data set whose training split samples are compared with, as in data.path; null: the recipe's own.",
    )
    reference_features: int | None = Field(
        None,
        ge=2,
        description="Reference features kept, evenly spread over the split, for all metrics but fd; null: all of them.",
    )
    cache: str | None = Field(
        None,
        min_length=1,
        description="Folder in which reference features are kept for many runs; null: in the run's own folder.",
    )
    resamples: int = Field(
        100, ge=0, description="Bootstrap resamples behind each confidence interval; 0 for no intervals."
    )
    show_samples: int = Field(40, ge=1, le=1024, description="Samples in the picture grid or text file that is logged.")

    @property
    def held_out_metrics(self) -> list[HeldOutMetricConfig]:
        """The metrics of held-out data that the objective does not measure itself."""
        return [metric for metric in self.metrics if isinstance(metric, HeldOutMetricConfig)]

    @property
    def sample_metrics(self) -> list[SampleMetricConfig]:
        """The metrics that score drawn samples."""
        return [metric for metric in self.metrics if isinstance(metric, SampleMetricConfig)]

    def features_of(self, metric: FeatureMetricConfig) -> FeaturesConfig:
        """The feature space of a metric, its own setting counted in."""
        return self.features if metric.features is None else metric.features
