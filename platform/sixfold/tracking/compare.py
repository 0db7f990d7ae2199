"""Compares what two runs measured: how far every metric differs over the steps they share, and where one lacks it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sixfold.tracking.events import read_metrics

MACHINE_GROUPS = ("perf/", "data/", "system/", "ckpt/")
"""Groups that measure the machine, not the training: they differ between any two runs."""


@dataclass(frozen=True, kw_only=True)
class MetricDifference:
    """How far one metric differs between runs A and B.

    Attributes:
        largest: largest relative difference ``|a - b| / max(|a|, |b|)`` over the common steps; 0 for two equal values
            (NaN equals NaN), infinity where only one is finite.
        step: where it occurs, with the values there.
        common_steps: number of steps at which both runs have the metric.
        only_in_a: steps at which only run A has it; empty or holds every step when B lacks the metric.
    """

    name: str
    largest: float
    step: int | None
    value_a: float | None
    value_b: float | None
    common_steps: int
    only_in_a: tuple[int, ...]
    only_in_b: tuple[int, ...]

    @property
    def incomplete(self) -> bool:
        """Whether one run lacks steps that the other has: what was not measured agrees with nothing."""
        return bool(self.only_in_a or self.only_in_b)


def compare(run_a: Path, run_b: Path, *, machine: bool = False) -> list[MetricDifference]:
    """Return one entry for each metric of either run, the most different first.

    Args:
        run_a: a run folder.
        run_b: another.
        machine: also compare the metrics of the machine (``perf/ data/ system/ ckpt/``).

    Raises:
        UserError: a folder has no readable event log.
    """
    a, b = read_metrics(run_a), read_metrics(run_b)
    names = [name for name in sorted(a.keys() | b.keys()) if machine or not name.startswith(MACHINE_GROUPS)]
    differences = [_difference(name, a.get(name, {}), b.get(name, {})) for name in names]
    return sorted(differences, key=lambda difference: -difference.largest)


def relative_difference(a: float, b: float) -> float:
    """Return ``|a - b| / max(|a|, |b|)``; 0 for equal values, infinity where exactly one is not finite."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def _difference(name: str, a: Mapping[int, float], b: Mapping[int, float]) -> MetricDifference:
    common = sorted(a.keys() & b.keys())
    # The first step with the largest difference: that is where two runs part.
    step = max(common, key=lambda step: (relative_difference(a[step], b[step]), -step), default=None)
    return MetricDifference(
        name=name,
        largest=0.0 if step is None else relative_difference(a[step], b[step]),
        step=step,
        value_a=None if step is None else a[step],
        value_b=None if step is None else b[step],
        common_steps=len(common),
        only_in_a=tuple(sorted(a.keys() - b.keys())),
        only_in_b=tuple(sorted(b.keys() - a.keys())),
    )
