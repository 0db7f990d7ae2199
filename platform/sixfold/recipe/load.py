"""From a file or a name and overrides to a checked recipe, with every fault of one stage reported at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sixfold.config.composition import compose_file, merge
from sixfold.config.faults import faults_of
from sixfold.config.overrides import parse_overrides
from sixfold.config.provenance import Layer, Provenance, display_path
from sixfold.config.schema import Slot, with_default_types
from sixfold.errors import RecipeError
from sixfold.recipe.catalogue import find_recipe
from sixfold.recipe.checks import check_recipe
from sixfold.recipe.recipe import Recipe


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, where each of its settings was written, and the file it was loaded from."""

    recipe: Recipe
    provenance: Provenance
    source: Path


def load_recipe(reference: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Load, compose, override, validate and check a recipe.

    Args:
        reference: a YAML file, or a name that ``sixfold recipes`` lists.
        overrides: ``a.b.c=value`` texts, applied after every base.

    Raises:
        RecipeError: with every fault of the first stage that has any: files and overrides, then keys and values, then
            the checks across sections that hold for any number of ranks.
    """
    source = find_recipe(str(reference))
    layer = _read(source, overrides)
    if "stages" in layer.values:
        raise RecipeError.of(
            "this is a pipeline, not a recipe: it has stages",
            where=display_path(source),
            fix=f"`sixfold run {reference} --dry-run` shows its stages, and without --dry-run runs them",
        )
    provenance = Provenance(display_path(source), layer.places)
    recipe = validate_recipe(layer.values, provenance)
    check_recipe(recipe, provenance=provenance)
    return LoadedRecipe(recipe, provenance, source)


def _read(source: Path, overrides: Sequence[str]) -> Layer:
    override_layer, override_faults = parse_overrides(overrides)
    try:
        layer = compose_file(source)
    except RecipeError as error:
        raise RecipeError(*error.faults, *override_faults) from None
    if override_faults:
        raise RecipeError(*override_faults)
    return merge(layer, override_layer)


def validate_recipe(values: dict[str, Any], provenance: Provenance) -> Recipe:
    """Validate plain values against the recipe's schema.

    Raises:
        RecipeError: with one fault for each key that is unknown, missing or has a value that is not allowed.
    """
    values = with_default_types(values, Slot(Recipe))
    try:
        # read as JSON, in which strict models take a list for a tuple: the one container that YAML has
        return Recipe.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise RecipeError(*faults_of(error, root=Recipe, values=values, provenance=provenance)) from None
