"""The engines that must agree, and the comparison: one process is the reference, every other way must follow it.

``run_matrix(train, *args)`` takes an importable ``train(config, accumulation, *args) -> Trajectory`` and works for the
toy network as for any recipe; ``table`` prints what it found.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ranks import rank_pool
from sixfold.engine.config import DDPConfig, DeepSpeedConfig, EngineConfig, FSDPConfig

RELATIVE_TOLERANCE = 1e-5
FULL = os.environ.get("SIXFOLD_PARITY") == "full"
"""Whether everything is to be tried, as ``make parity`` does, or what the suite has time for."""

MATRIX: dict[str, tuple[int, EngineConfig]] = {
    "1 process": (1, DDPConfig(precision="fp32")),
    "DDP 2": (2, DDPConfig(precision="fp32")),
    "FSDP2 2": (2, FSDPConfig(precision="fp32")),
    "FSDP2 4": (4, FSDPConfig(precision="fp32")),
    "HSDP 2x2": (4, FSDPConfig(precision="fp32", replicate=2)),
    "ZeRO-1 2": (2, DeepSpeedConfig(precision="fp32", zero_stage=1)),
    "ZeRO-2 2": (2, DeepSpeedConfig(precision="fp32", zero_stage=2)),
    "ZeRO-3 2": (2, DeepSpeedConfig(precision="fp32", zero_stage=3)),
}
"""Name to number of ranks and engine settings."""


@dataclass(frozen=True)
class Trajectory:
    """Global mean losses and gradient norms by step."""

    losses: list[float]
    grad_norms: list[float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """How far one way of training is from the reference: the largest relative difference over steps and ranks."""

    name: str
    accumulation: int
    loss: float
    grad_norm: float

    @property
    def agrees(self) -> bool:
        """Whether both are within the tolerance."""
        return max(self.loss, self.grad_norm) <= RELATIVE_TOLERANCE


def run_matrix(
    train: Callable[..., Trajectory],
    *args: Any,
    names: Sequence[str] = tuple(MATRIX),
    accumulations: Sequence[int] = (1, 2),
) -> list[Row]:
    """Train the reference here and every other way on pools of ranks; return one row each."""
    reference = train(MATRIX["1 process"][1], 1, *args)
    # A role behind zero-initialised layers has no gradient in its first steps.
    assert all(loss > 0 and norm >= 0 for loss, norm in zip(reference.losses, reference.grad_norms, strict=True))
    assert sum(norm > 0 for norm in reference.grad_norms) > 0.8 * len(reference.grad_norms)
    return [
        compare(name, accumulation, reference, trajectories(name, train, accumulation, *args))
        for name in names
        for accumulation in accumulations
    ]


def trajectories(name: str, train: Callable[..., Trajectory], accumulation: int, *args: Any) -> list[Trajectory]:
    """Train one way; return every rank's trajectory."""
    ranks, config = MATRIX[name]
    if ranks == 1:
        return [train(config, accumulation, *args)]
    return rank_pool(ranks).run(train, config, accumulation, *args)


def compare(name: str, accumulation: int, reference: Trajectory, others: Sequence[Trajectory]) -> Row:
    """Compare all ranks' trajectories with the reference."""
    return Row(
        name=name,
        accumulation=accumulation,
        loss=max(largest_relative_difference(other.losses, reference.losses) for other in others),
        grad_norm=max(largest_relative_difference(other.grad_norms, reference.grad_norms) for other in others),
    )


def largest_relative_difference(values: Sequence[float], reference: Sequence[float]) -> float:
    """max |v - r| / |r|, nothing where they are equal; a NaN is infinitely far."""
    differences = [_relative(v, r) for v, r in zip(values, reference, strict=True)]
    return max(d if d == d else float("inf") for d in differences)


def _relative(value: float, reference: float) -> float:
    if value == reference:
        return 0.0
    return abs(value - reference) / abs(reference) if reference else float("inf")


def table(title: str, rows: Sequence[Row]) -> str:
    """Return the rows as text."""
    lines = [
        f"{title}: largest relative difference from one process",
        f"{'engine':<12}{'accumulate':>11}{'loss':>12}{'norm':>12}",
    ]
    lines += [
        f"{row.name:<12}{row.accumulation:>11}{row.loss:>12.1e}{row.grad_norm:>12.1e}"
        + ("" if row.agrees else "  DISAGREES")
        for row in rows
    ]
    return "\n".join(lines)
