"""What samples are compared with: features of the training and held-out splits, extracted once and kept.

All ranks extract their share; rank 0 alone keeps the result, in a file named by a hash of the extractor (its weights
and preprocessing) and of the data, so that nothing that would change the numbers is ever mixed up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast

import torch
from jaxtyping import Float, Float64
from safetensors import safe_open
from torch import Tensor

from sixfold.distributed.collectives import broadcast_object, gather_objects, sum_over_ranks
from sixfold.errors import DataError
from sixfold.evaluation.config import EvaluationConfig, FeatureMetricConfig
from sixfold.evaluation.contract import Estimate
from sixfold.evaluation.extractor_config import FeaturesConfig
from sixfold.evaluation.features import (
    ClassifierFeatures,
    FeatureExtractor,
    LabelledImages,
    keep_tensors,
    load_or_train_classifier,
    require_finite,
)
from sixfold.objectives.contract import Batch

_VERSION = "reference/1"
"""Part of the cache key: any change to what is kept needs a new one."""

Split = Literal["training", "held_out"]


class ImageSource(Protocol):
    """The images that samples imitate."""

    @property
    def fingerprint(self) -> str:
        """Identifies the images of both splits as they are decoded."""
        ...

    def size(self, split: Split) -> int:
        """How many images a split has."""
        ...

    def shares(self, split: Split) -> Iterator[Batch]:
        """Batches of this rank's share of a split, with ``image``; every rank gets as many, the last maybe empty."""
        ...

    def whole(self, split: Split) -> LabelledImages:
        """A whole split, for a data set small enough to train a classifier on in memory."""
        ...


@dataclass(frozen=True, kw_only=True)
class ReferenceFeatures:
    """Features of a split.

    Attributes:
        name: of the feature space, for messages.
        count: how many images the moments are of.
        mean: of all of them.
        covariance: of all of them, unbiased.
        rows: features of some of them, evenly spread over the split, or of all.
    """

    name: str
    count: int
    mean: Float64[Tensor, " d"]
    covariance: Float64[Tensor, "d d"]
    rows: Float[Tensor, "k d"]

    def require_covariance(self) -> None:
        """Raise DataError unless the covariance can have full rank."""
        self.require_more_than(len(self.mean), f"the covariance of {len(self.mean)} {self.name} features", self.count)

    def require_more_than(self, least: int, what: str, count: int | None = None) -> None:
        """Raise DataError unless there are more rows (or ``count``) than ``least``."""
        held = len(self.rows) if count is None else count
        if held <= least:
            raise DataError.of(
                f"{held} reference images are too few for {what}",
                where="evaluation.reference, else the training split of data.path",
                allowed=f"more than {least} images",
                fix="choose evaluation.features with fewer dimensions, name a larger data set in evaluation.reference, "
                "or raise evaluation.reference_features",
            )


class References:
    """Builds what the metrics of one evaluation share; the same calls in the same order on every rank.

    Args:
        config: the evaluation section.
        source: the images.
        cache: folder of kept features and classifiers.
        device: where features are computed.
        rank: of this process; rank 0 keeps the results.
    """

    def __init__(
        self, config: EvaluationConfig, source: ImageSource, *, cache: Path, device: torch.device, rank: int
    ) -> None:
        self.config, self.source, self.cache, self.device = config, source, cache, device
        self.resamples = config.resamples
        self.used_classifier: ClassifierFeatures | None = None
        self._rank = rank
        self._extractors: dict[str, FeatureExtractor] = {}
        self._features: dict[tuple[str, Split], ReferenceFeatures | None] = {}

    def extractor_of(self, metric: FeatureMetricConfig) -> FeatureExtractor:
        """The extractor of a metric's feature space."""
        return self.extractor(self.config.features_of(metric))

    def extractor(self, config: FeaturesConfig) -> FeatureExtractor:
        """Build an extractor, once for equal settings.

        Raises:
            UserError: its files or its callable cannot be loaded.
            RecipeError: a classifier is asked for and the images have no labels.
        """
        key = config.model_dump_json()
        if key not in self._extractors:
            self._extractors[key] = config.load()(config, self)
        return self._extractors[key]

    def classifier(self) -> ClassifierFeatures:
        """The classifier of the training split, trained on rank 0 unless it is kept already; a collective."""
        if self.used_classifier is None:
            made = None
            if self._rank == 0:
                training, held_out = self.source.whole("training"), self.source.whole("held_out")
                made = load_or_train_classifier(
                    training, held_out, cache=self.cache, fingerprint=self.source.fingerprint
                )
            self.used_classifier = broadcast_object(made).to(self.device)
        return self.used_classifier

    def facts(self) -> list[Estimate]:
        """What a reader must know of the spaces that were used: how far the classifier can be trusted."""
        if self.used_classifier is None:
            return []
        trained = self.used_classifier
        return [Estimate(name="classifier_accuracy", value=trained.accuracy, samples=trained.held_out_samples)]

    def features(self, extractor: FeatureExtractor, split: Split) -> ReferenceFeatures | None:
        """A split's features, on rank 0 (None elsewhere); a collective.

        Raises:
            DataError: the extractor makes features that are not finite.
        """
        key = (extractor.identity, split)
        if key not in self._features:
            path = self._path(extractor, split)
            if not broadcast_object(path.exists() if self._rank == 0 else None):
                self._extract(extractor, split, path)
            self._features[key] = _read(path, extractor.name, self.device) if self._rank == 0 else None
        return self._features[key]

    def derived(
        self, extractor: FeatureExtractor, split: Split, name: str, make: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        """What ``make`` makes of a split's rows, kept as the features are; on rank 0 (None elsewhere), a collective."""
        features = self.features(extractor, split)
        if features is None:
            return None
        path = self._path(extractor, split, name)
        if not path.exists():
            keep_tensors(path, {"derived": make(features.rows).cpu()})
        with safe_open(path, framework="pt") as file:
            return cast(Tensor, file.get_tensor("derived").to(self.device))

    def _path(self, extractor: FeatureExtractor, split: Split, name: str = "reference") -> Path:
        parts = (_VERSION, extractor.identity, self.source.fingerprint, split, str(self.config.reference_features))
        return self.cache / f"{name}-{hashlib.sha256('/'.join(parts).encode()).hexdigest()[:16]}.safetensors"

    def _extract(self, extractor: FeatureExtractor, split: Split, path: Path) -> None:
        """Sum moments over ranks, gather the rows that are kept, and write both from rank 0."""
        count = self.source.size(split)
        kept = _evenly(count, self.config.reference_features)
        total: Tensor | None = None
        squares: Tensor | None = None
        positions, rows = [], []
        for batch in self.source.shares(split):
            features = extractor(batch["image"].to(self.device)).double()
            require_finite(features, f"features of {split.replace('_', '-')} images, by {extractor.name},", DataError)
            total = features.sum(0) if total is None else total + features.sum(0)
            squares = features.T @ features if squares is None else squares + features.T @ features
            chosen = kept[batch.positions]
            positions.append(batch.positions[chosen])
            rows.append(features[chosen.to(self.device)].float().cpu())
        assert total is not None, "a reader gives every rank at least one batch"
        assert squares is not None
        summed = sum_over_ranks({"total": total, "squares": squares})
        gathered = gather_objects((torch.cat(positions), torch.cat(rows)))
        if self._rank != 0:
            return
        mean = summed["total"] / count
        covariance = (summed["squares"] - count * torch.outer(mean, mean)) / max(count - 1, 1)
        order = torch.cat([places for places, _ in gathered]).argsort()
        everything = {
            "mean": mean.cpu(),
            "covariance": covariance.cpu(),
            "rows": torch.cat([part for _, part in gathered])[order].contiguous(),
        }
        keep_tensors(path, everything, count=str(count))


def _evenly(count: int, kept: int | None) -> Tensor:
    """Mark which of ``count`` images keep their features: all, or ``kept`` at equal distances."""
    marks = torch.ones(count, dtype=torch.bool)
    if kept is not None and kept < count:
        marks.zero_()
        marks[torch.arange(kept) * count // kept] = True
    return marks


def _read(path: Path, name: str, device: torch.device) -> ReferenceFeatures:
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key).to(device) for key in ("mean", "covariance", "rows")}
        return ReferenceFeatures(name=name, count=int(file.metadata()["count"]), **tensors)
