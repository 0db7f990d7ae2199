"""What a metric of drawn samples is: each sample becomes a row, and the rows of all samples become estimates.

Rows are made on every rank, right after its samples are drawn, so that only rows travel: features or scores, never
pictures. Estimates are made on rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Drawn images and what they were drawn for.

    Attributes:
        images: in [-1, 1].
        conditions: ``label`` ``[n]``, ``caption`` ``[n, length]`` (tokens), as the networks were given them.
        captions: captions as text; None where the data have none.
    """

    images: Float[Tensor, "n channels height width"]
    conditions: Mapping[str, Tensor]
    captions: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One measured number and how far it can be trusted.

    Attributes:
        name: what it is logged as, after ``val/``.
        value: the estimate.
        margin: half the width of its 95% confidence interval; None where none was computed.
        better: which way is better; None for context such as the classifier's own accuracy.
        samples: how many samples it rests on.
        reference: how many reference images they were compared with; None for none.
        space: the feature space, as in FD(<space>); None for none.
    """

    name: str
    value: float
    margin: float | None = None
    better: Literal["lower", "higher"] | None = None
    samples: int
    reference: int | None = None
    space: str | None = None


class SampleMetric(Protocol):
    """A metric of drawn samples.

    Constructed on every rank as ``implementation(config, references)`` from its
    :class:`~sixfold.evaluation.config.SampleMetricConfig` and a :class:`~sixfold.evaluation.references.References`;
    whatever it prepares there may use all ranks.
    """

    view: str
    """Names what the rows hold: metrics with the same view share their rows."""

    def rows(self, drawn: Drawn) -> Float[Tensor, "n ..."]:
        """Return one row a sample, a function of that sample alone."""
        ...

    def estimates(self, rows: Float[Tensor, "n ..."]) -> list[Estimate]:
        """Return what the rows of all samples say; called on rank 0."""
        ...
