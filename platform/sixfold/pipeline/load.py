"""From a pipeline file and overrides to a checked pipeline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from sixfold.config.composition import compose_file, merge
from sixfold.config.faults import faults_of
from sixfold.config.overrides import parse_overrides
from sixfold.config.provenance import Provenance, display_path
from sixfold.config.schema import Slot, with_default_types
from sixfold.errors import RecipeError
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
    layer = merge(compose_file(source), changes)
    provenance = Provenance(display_path(source), layer.places)
    values = with_default_types(layer.values, Slot(PipelineConfig))
    try:
        return PipelineConfig.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise RecipeError(*faults_of(error, root=PipelineConfig, values=values, provenance=provenance)) from None
