"""Where each setting came from: a line of a file, an override on the command line, or a default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KeyPath = tuple[str, ...]
"""The keys from the top of a recipe to one of its nodes, with list positions: ``("evaluation", "metrics", "0")``."""

DEFAULT = "default"
"""What the provenance of a setting says that nobody wrote."""


@dataclass(frozen=True)
class Place:
    """Where a node was written: ``recipes/lm/moe-smoke.yaml:12``, or ``override train.steps=5`` (no line)."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Layer:
    """Plain values (mappings, lists, scalars) and the place of each node; layers merge into a recipe."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)


@dataclass(frozen=True)
class Provenance:
    """Answers, for any key of a resolved recipe, where its value was written."""

    source: str
    """The recipe as the user named it, for keys that were written nowhere."""
    places: Mapping[KeyPath, Place] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """Return the place of a dotted key's value, or ``default`` when it was written nowhere."""
        path = tuple(key.split("."))
        place = self.places.get(path)
        if place is None and path[-1] == "type" and not any(other[:-1] == path[:-1] for other in self.places):
            place = self.places.get(path[:-1])  # a name that stands for a section of that type
        return DEFAULT if place is None else str(place)

    def nearest(self, path: KeyPath) -> str:
        """Return the place to look at for a path: its own, else an entry's, else its section's, else the recipe."""
        if path in self.places:
            return str(self.places[path])
        for other, place in self.places.items():
            if path and other[: len(path)] == path:
                return str(place)
        return self.nearest(path[:-1]) if path else self.source


def dotted(path: KeyPath) -> str:
    """Spell a path as in an override: ``evaluation.metrics.0``."""
    return ".".join(path)


def display_path(path: Path) -> str:
    """Spell a file relative to the working directory where it lies below it, else in full."""
    resolved = path.resolve()
    here = Path.cwd().resolve()
    return str(resolved.relative_to(here)) if resolved.is_relative_to(here) else str(resolved)
