"""Scores of generated images against the splits that they imitate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float, Int64
from torch import Tensor

from sixfold.evaluation.config import EvaluationConfig
from sixfold.evaluation.features import (
    ClassifierFeatures,
    FeatureExtractor,
    LabelledImages,
    PixelFeatures,
    load_or_train_classifier,
)
from sixfold.evaluation.frechet import frechet_distance, half_split_fd, moments
from sixfold.evaluation.kernel_distance import kernel_distance
from sixfold.evaluation.nearest_neighbour import nearest_neighbour_ratio

SAMPLE_METRICS = frozenset({"fd", "kid", "nearest_neighbour", "conditional_accuracy"})
"""The metrics of :class:`EvaluationConfig` that score samples; the others score held-out data."""


class ImageScores:
    """Compares samples with a training split, and with how far held-out images and the split's own halves are from it.

    Everything that does not depend on the samples is computed once, at construction.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        training: LabelledImages,
        held_out: LabelledImages,
        *,
        cache: Path,
        fingerprint: str,
    ) -> None:
        """Prepare the reference side.

        Args:
            config: what to measure, and in which features.
            training: the training split.
            held_out: the held-out split.
            cache: folder in which a trained classifier is kept.
            fingerprint: identifies the training split's contents.
        """
        self.metrics: Sequence[str] = [metric for metric in config.metrics if metric in SAMPLE_METRICS]
        self.training, self.held_out = training, held_out
        self.classifier: ClassifierFeatures | None = None
        if config.features == "classifier" or "conditional_accuracy" in self.metrics:
            self.classifier = load_or_train_classifier(training, held_out, cache=cache, fingerprint=fingerprint)
        self.extractor: FeatureExtractor = (
            self.classifier if self.classifier is not None and config.features == "classifier" else PixelFeatures()
        )
        self.features = self.extractor(training.images)
        self.half_split_fd = (
            half_split_fd(self.features, seed=0, splits=config.half_splits) if "fd" in self.metrics else 0.0
        )

    def __call__(
        self, samples: Float[Tensor, "n channels height width"], labels: Int64[Tensor, " n"] | None
    ) -> dict[str, float]:
        """Return the asked-for scores.

        ``fd`` comes with ``fd_ratio``, its value over the distance between random halves of the training split (1 or
        less is as good as new data); ``nearest_neighbour`` is a ratio to held-out images; ``classifier_accuracy``
        says how far the classifier can be trusted.
        """
        scores: dict[str, float] = {}
        features = self.extractor(samples)
        if "fd" in self.metrics:
            scores["fd"] = frechet_distance(moments(features), moments(self.features))
            scores["fd_ratio"] = scores["fd"] / self.half_split_fd
        if "kid" in self.metrics:
            scores["kid"] = kernel_distance(features, self.features)
        if "nearest_neighbour" in self.metrics:
            scores["nearest_neighbour"] = nearest_neighbour_ratio(samples, self.held_out.images, self.training.images)
        if self.classifier is not None:
            scores["classifier_accuracy"] = self.classifier.accuracy
            if "conditional_accuracy" in self.metrics and labels is not None:
                scores["conditional_accuracy"] = float((self.classifier.predict(samples) == labels).float().mean())
        return scores
