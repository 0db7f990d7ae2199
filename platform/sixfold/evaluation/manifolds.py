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
from sixfold.evaluation.pairs import squared_distances
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
    candidates = min(neighbours + 1 + _SPARE_CANDIDATES, len(centres))
    radii = []
    for rows in torch.split(centres, block):
        nearest = squared_distances(rows, centres).topk(candidates, dim=1, largest=False).indices
        row = torch.arange(len(rows), device=rows.device).repeat_interleave(candidates)
        found = _distances(rows, row, centres, nearest.flatten()).view_as(nearest)
        # the nearest of all is the point itself, at distance 0
        radii.append(found.kthvalue(neighbours + 1, dim=1).values)
    return Balls(centres=centres, radii=torch.cat(radii))


def balls_holding(
    points: Float[Tensor, "n d"], balls: Balls, *, block: int = 1024
) -> tuple[Int64[Tensor, " n"], Bool[Tensor, " m"]]:
    """Return in how many balls each point lies, and which balls hold any point; a ball's surface belongs to it."""
    counts, holding = [], torch.zeros(len(balls.radii), dtype=torch.bool, device=points.device)
    for rows in torch.split(points.double(), block):
        beyond = squared_distances(rows, balls.centres) - balls.radii.square()
        inside = beyond <= 0.0
        scale = rows.square().sum(1).amax() + balls.centres.square().sum(1).amax()
        row, ball = (beyond.abs() <= _ROUNDING * scale).nonzero(as_tuple=True)
        inside[row, ball] = _distances(rows, row, balls.centres, ball) <= balls.radii[ball]
        counts.append(inside.sum(1))
        holding |= inside.any(0)
    return torch.cat(counts), holding


_SPARE_CANDIDATES = 4
"""Beyond those asked for: rounding may exchange neighbours that are equally far."""
_ROUNDING = 1e-10
"""Bound on the error of a squared distance by products, over the squared norms: a float64 keeps 16 digits."""


def _distances(
    first: Float64[Tensor, "n d"],
    of_first: Int64[Tensor, " p"],
    second: Float64[Tensor, "m d"],
    of_second: Int64[Tensor, " p"],
    *,
    block: int = 8192,
) -> Float64[Tensor, " p"]:
    """Distances of pairs that are named by their numbers, by differences: equal points are exactly 0 apart."""
    pairs = zip(torch.split(of_first, block), torch.split(of_second, block), strict=True)
    return torch.cat([torch.linalg.vector_norm(first[one] - second[other], dim=1) for one, other in pairs])


class _ManifoldMetric:
    """What both metrics share: features, and the data's balls."""

    def __init__(self, config: PrecisionRecallConfig | DensityCoverageConfig, references: References) -> None:
        self._neighbours, self._resamples = config.neighbours, references.resamples
        self._extractor = references.extractor_of(config)
        self.view = self._extractor.identity
        reference = references.features(self._extractor, "training")
        if reference is not None:
            reference.require_more_than(config.neighbours, f"{config.type} with neighbours = {config.neighbours}")
            radii = references.derived(
                *(self._extractor, "training", f"radii-{config.neighbours}"),
                lambda rows: balls_around(rows, neighbours=config.neighbours).radii,
            )
            assert radii is not None, "where there are features there is what is made of them"
            self._data = Balls(centres=reference.rows.double(), radii=radii)

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
