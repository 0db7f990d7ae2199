"""The JSON Schema of recipe files, for completion and marks in editors."""

from __future__ import annotations

from typing import Any

from sixfold.config.composition import BASE
from sixfold.recipe.recipe import Recipe


def recipe_file_schema() -> dict[str, Any]:
    """The schema of one recipe *file*, in which a ``base`` may supply what the file leaves out.

    It therefore requires nothing, and knows keys, types, bounds and descriptions; what is missing after composition is
    reported by ``sixfold show``.
    """
    schema: dict[str, Any] = _relaxed(Recipe.model_json_schema())
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Sixfold recipe"
    for section in ("networks", "roles"):  # an entry that a base file wrote is removed by null
        patterns = schema["properties"][section]["patternProperties"]
        for pattern, entry in patterns.items():
            patterns[pattern] = {"anyOf": [entry, {"type": "null"}]}
    schema["properties"][BASE] = {
        "description": "Recipe file or files that this one stands on, relative to it; later ones win.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    return schema


def _relaxed(node: Any) -> Any:
    """Drop ``required``; turn ``oneOf`` into ``anyOf``, since a section without its ``type`` fits several kinds."""
    if isinstance(node, list):
        return [_relaxed(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {key: value for key, value in node.items() if not (key == "required" and isinstance(value, list))}
    return {"anyOf" if key == "oneOf" else key: _relaxed(value) for key, value in kept.items()}
