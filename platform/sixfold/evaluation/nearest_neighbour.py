"""Memorisation: how near samples lie to training images, compared with held-out images.

A generator that copies its training set has a perfect Frechet distance; its distance to the nearest training image
betrays it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sixfold.evaluation.bootstrap import mean_margin
from sixfold.evaluation.config import NearestNeighbourConfig
from sixfold.evaluation.contract import Drawn, Estimate
from sixfold.evaluation.extractor_config import PixelFeaturesConfig
from sixfold.evaluation.references import References


def nearest_distances(
    queries: Float[Tensor, "n ..."], references: Float[Tensor, "m ..."], *, block: int = 1024
) -> Float[Tensor, " n"]:
    """Return each query's Euclidean distance to the nearest reference."""
    flat = references.flatten(1)
    return torch.cat([torch.cdist(rows, flat).amin(1) for rows in torch.split(queries.flatten(1), block)])


def nearest_neighbour_ratio(
    samples: Float[Tensor, "n ..."], held_out: Float[Tensor, "k ..."], training: Float[Tensor, "m ..."]
) -> float:
    """Return the mean distance of samples to the nearest training example over that of held-out examples.

    About 1 for a generator that generalises, 0 for one that copies; above 1 where samples stray from the data.
    """
    held_out_distance = nearest_distances(held_out, training).mean()
    return float(nearest_distances(samples, training).mean() / held_out_distance)


class NearestNeighbourMetric:
    """``nearest_neighbour``: the ratio of mean distances, in pixels."""

    def __init__(self, config: NearestNeighbourConfig, references: References) -> None:
        self._resamples = references.resamples
        self._extractor = references.extractor(PixelFeaturesConfig())
        self.view = self._extractor.identity
        training = references.features(self._extractor, "training")
        held_out = references.features(self._extractor, "held_out")
        if training is not None and held_out is not None:
            self._training = training.rows
            self._scale = float(nearest_distances(held_out.rows, training.rows).mean())

    def rows(self, drawn: Drawn) -> Float[Tensor, "n d"]:
        """The samples' pixels."""
        return self._extractor(drawn.images)

    def estimates(self, rows: Float[Tensor, "n d"]) -> list[Estimate]:
        """Return the ratio."""
        ratios = nearest_distances(rows, self._training) / self._scale
        return [
            Estimate(
                name="nearest_neighbour",
                value=float(ratios.mean()),
                margin=mean_margin(ratios, self._resamples),
                better="higher",
                samples=len(rows),
                reference=len(self._training),
                space=self._extractor.name,
            )
        ]
