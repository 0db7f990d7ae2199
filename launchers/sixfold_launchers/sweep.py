"""Sweeps: a small YAML file that names the runs of an array, as a grid, as a list, or as a grid at each point."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from sixfold.config.base import Config
from sixfold.config.faults import faults_of
from sixfold.config.loading import read_yaml
from sixfold.config.provenance import Provenance, display_path
from sixfold.errors import UserError

MAX_RUNS = 1000


class SweepConfig(Config):
    """Which overrides each run of a sweep gets."""

    grid: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict, description="Values by dotted key; every combination is a run."
    )
    points: tuple[dict[str, Any], ...] = Field(
        default=(), description="Overrides by dotted key, one mapping a run (or a grid's worth of runs)."
    )

    @model_validator(mode="after")
    def _names_runs(self) -> SweepConfig:
        if not self.grid and not self.points:
            raise ValueError("a sweep needs `grid:` (values by key) or `points:` (a list of mappings); write one")
        for key, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{key} is an empty list, so there is no run; give it values or remove it")
        return self

    def runs(self) -> list[tuple[str, ...]]:
        """The overrides of each run, as the command line spells them: points outermost, the last key fastest."""
        return [
            tuple(f"{key}={json.dumps(value)}" for key, value in {**point, **dict(combination)}.items())
            for point in self.points or ({},)
            for combination in itertools.product(*(_pairs(key, values) for key, values in self.grid.items()))
        ]


def _pairs(key: str, values: Sequence[Any]) -> list[tuple[str, Any]]:
    return [(key, value) for value in values]


def load_sweep(path: Path) -> list[tuple[str, ...]]:
    """Read a sweep file and return the overrides of each run.

    Raises:
        UserError: the file is malformed, with file and line, or names too many runs.
    """
    layer, faults = read_yaml(path)
    if faults:
        raise UserError(*faults)
    try:
        sweep = SweepConfig.model_validate_json(json.dumps(layer.values))
    except ValidationError as error:
        provenance = Provenance(display_path(path), layer.places)
        raise UserError(*faults_of(error, root=SweepConfig, values=layer.values, provenance=provenance)) from None
    runs = sweep.runs()
    if len(runs) > MAX_RUNS:
        raise UserError.of(
            f"the sweep names {len(runs)} runs",
            where=display_path(path),
            allowed=f"at most {MAX_RUNS}",
            fix="split it into several",
        )
    for run, times in Counter(runs).items():
        if times > 1:
            raise UserError.of(
                f"two runs of the sweep are the same: {' '.join(run) or 'no overrides'}",
                where=display_path(path),
                fix="remove one, or give them different seeds",
            )
    return runs
