"""From a pipeline file and overrides to a checked pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sixfold.config.composition import compose_file, merge
from sixfold.config.faults import faults_of
from sixfold.config.overrides import parse_overrides
from sixfold.config.provenance import Layer, Provenance, display_path
from sixfold.config.schema import Slot, nearest, with_default_types
from sixfold.errors import Fault, RecipeError
from sixfold.pipeline.config import PipelineConfig

STAGES = "stages"


def is_pipeline(source: Path) -> bool:
    """Whether a file holds a pipeline rather than a recipe."""
    try:
        return STAGES in compose_file(source).values
    except RecipeError:
        return False  # whoever loads it as a recipe reports the faults


def load_pipeline(source: Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Load, compose, override and validate a pipeline.

    Raises:
        RecipeError: with every fault.
    """
    changes, faults = parse_overrides(overrides)
    if faults:
        raise RecipeError(*faults)
    file = compose_file(source)
    if unknown := _unknown_stages(file.values, changes):
        raise RecipeError(*unknown)
    layer = merge(file, changes)
    provenance = Provenance(display_path(source), layer.places)
    values = with_default_types(layer.values, Slot(PipelineConfig))
    try:
        return PipelineConfig.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise RecipeError(*faults_of(error, root=PipelineConfig, values=values, provenance=provenance)) from None


def _unknown_stages(values: Mapping[str, Any], changes: Layer) -> list[Fault]:
    """Faults of overrides that change stages which the file does not have; one that says its type is a new stage."""
    known, changed = values.get(STAGES), changes.values.get(STAGES)
    if not isinstance(known, dict) or not isinstance(changed, dict):
        return []
    return [
        Fault(
            what=f"there is no stage {name!r}",
            where=f"override {STAGES}.{name}",
            allowed=", ".join(known),
            fix=f"did you mean {STAGES}.{nearest(name, list(known)) or next(iter(known))}?",
        )
        for name, stage in changed.items()
        if name not in known and not (isinstance(stage, dict) and "type" in stage)
    ]
