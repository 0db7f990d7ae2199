"""Fidelity and variety apart: precision and recall (1904.06991), density and coverage (2002.09797).

A set's manifold is approximated by balls around its points, each reaching to the point's k-th nearest neighbour in the
same set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from sixfold.evaluation.bootstrap import mean_margin
from sixfold.evaluation.config import DensityCoverageConfig, PrecisionRecallConfig
from sixfold.evaluation.contract import Drawn, Estimate
from sixfold.evaluation.references import References


@dataclass(frozen=True, kw_only=True)
class Balls:
    """Balls around points, in float64."""

    centres: Float64[Tensor, "m d"]
    radii: Float64[Tensor, " m"]


def balls_around(points: Float[Tensor, "m d"], *, neighbours: int, block: int = 1024) -> Balls:
    """Give every point the ball that reaches its ``neighbours``-th nearest other point; needs more points than that."""
    assert len(points) > neighbours, f"{neighbours} neighbours need more than {len(points)} points"
    centres = points.double()
    # the nearest of all is the point itself, at distance 0
    radii = [distances(rows, centres).kthvalue(neighbours + 1, dim=1).values for rows in torch.split(centres, block)]
    return Balls(centres=centres, radii=torch.cat(radii))


def balls_holding(
    points: Float[Tensor, "n d"], balls: Balls, *, block: int = 1024
) -> tuple[Int64[Tensor, " n"], Bool[Tensor, " m"]]:
    """Return in how many balls each point lies, and which balls hold any point."""
    counts, holding = [], torch.zeros(len(balls.radii), dtype=torch.bool, device=points.device)
    for rows in torch.split(points.double(), block):
        inside = distances(rows, balls.centres) <= balls.radii
        counts.append(inside.sum(1))
        holding |= inside.any(0)
    return torch.cat(counts), holding


def distances(first: Float64[Tensor, "n d"], second: Float64[Tensor, "m d"]) -> Float64[Tensor, "n m"]:
    """Euclidean distances of all pairs, by differences: equal points are exactly 0 apart."""
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


class _ManifoldMetric:
    """What both metrics share: features, and the data's balls."""

    def __init__(self, config: PrecisionRecallConfig | DensityCoverageConfig, references: References) -> None:
        self._neighbours, self._resamples = config.neighbours, references.resamples
        self._extractor = references.extractor_of(config)
        self.view = self._extractor.identity
        reference = references.features(self._extractor, "training")
        if reference is not None:
            reference.require_more_than(config.neighbours, f"{config.type} with neighbours = {config.neighbours}")
            self._data = balls_around(reference.rows, neighbours=config.neighbours)

    def rows(self, drawn: Drawn) -> Float[Tensor, "n d"]:
        """The samples' features."""
        return self._extractor(drawn.images)

    def _mean(self, name: str, values: Tensor, samples: int) -> Estimate:
        return Estimate(
            name=name,
            value=float(values.double().mean()),
            margin=mean_margin(values, self._resamples),
            better="higher",
            samples=samples,
            reference=len(self._data.radii),
            space=self._extractor.name,
        )


class PrecisionRecallMetric(_ManifoldMetric):
    """``precision``: share of samples in any ball of the data; ``recall``: share of data in any ball of the samples.

    Intervals resample what the mean runs over, with both manifolds as they are.
    """

    def estimates(self, rows: Float[Tensor, "n d"]) -> list[Estimate]:
        """Return precision and recall."""
        in_data, _ = balls_holding(rows, self._data)
        samples = balls_around(rows, neighbours=min(self._neighbours, len(rows) - 1))
        in_samples, _ = balls_holding(self._data.centres, samples)
        return [
            self._mean("precision", in_data > 0, len(rows)),
            self._mean("recall", in_samples > 0, len(rows)),
        ]


class DensityCoverageMetric(_ManifoldMetric):
    """``density``: balls of the data around a sample, over k; ``coverage``: share of balls that hold a sample.

    A density of 1 is that of new data. Intervals resample what the mean runs over.
    """

    def estimates(self, rows: Float[Tensor, "n d"]) -> list[Estimate]:
        """Return density and coverage."""
        counts, holding = balls_holding(rows, self._data)
        return [
            self._mean("density", counts.double() / self._neighbours, len(rows)),
            self._mean("coverage", holding, len(rows)),
        ]
