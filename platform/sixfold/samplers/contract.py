"""What a sampler is: trained networks in, samples out, each a pure function of (seed, sample number)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Int64
from torch import Tensor

from sixfold.objectives.contract import Networks


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """Which samples to draw.

    Attributes:
        seed: seed of the draw.
        numbers: ``[n]`` int64 sample numbers on the target device: number i is the same sample on any rank.
        conditions: e.g. ``label`` ``[n]`` int64, or ``prompt`` ``[n, length]`` int64 tokens; empty for unconditional.
        steps: overrides the number of solver steps or of new tokens.
    """

    seed: int
    numbers: Int64[Tensor, " n"]
    conditions: Mapping[str, Tensor]
    steps: int | None = None


class Sampler(Protocol):
    """The contract of ``samplers/``: constructed as ``implementation(sampling, objective, networks)`` from configs."""

    def __call__(self, nets: Networks, request: SampleRequest) -> Mapping[str, Tensor]:
        """Return fields as in a :class:`~sixfold.objectives.contract.Batch`: ``image`` in [-1, 1], or ``tokens``."""
        ...
