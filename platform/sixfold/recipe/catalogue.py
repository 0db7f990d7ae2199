"""Finding recipes by name: the project's own ``./recipes`` first, then those that come with Sixfold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sixfold.config.composition import compose_file
from sixfold.config.provenance import display_path
from sixfold.config.schema import nearest
from sixfold.errors import RecipeError


@dataclass(frozen=True)
class CatalogueEntry:
    """A recipe that can be named: its name is its path below the recipe folder without the suffix."""

    name: str
    path: Path


def recipe_folders() -> list[Path]:
    """The folders that are searched, first wins: ``./recipes``, then the packaged ones (an editable install's own)."""
    here = Path(__file__).resolve()
    packaged = [here.parent / "builtin", here.parents[3] / "recipes"]
    folders = [Path.cwd() / "recipes", *packaged]
    return list(dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir()))


def catalogue() -> list[CatalogueEntry]:
    """Every recipe that can be named, by name; folders and files that start with ``_`` or ``.`` are building blocks."""
    entries: dict[str, CatalogueEntry] = {}
    for folder in recipe_folders():
        for path in _recipe_files(folder):
            name = path.relative_to(folder).with_suffix("").as_posix()
            entries.setdefault(name, CatalogueEntry(name, path))
    return sorted(entries.values(), key=lambda entry: entry.name)


def summarise(entry: CatalogueEntry) -> dict[str, str]:
    """What ``sixfold recipes`` says of one recipe; a recipe that cannot be read says why instead of its description."""
    try:
        values = compose_file(entry.path).values
    except RecipeError as error:
        values = {"description": f"cannot be read: {error.faults[0].what}"}
    networks = values.get("networks")
    stages = values.get("stages")
    if isinstance(stages, dict):
        described = {"objective": "pipeline", "networks": " > ".join(_enabled(stages)), "engine": ""}
        return {"name": entry.name, "path": display_path(entry.path), **described} | {
            "description": str(values.get("description", ""))
        }
    return {
        "name": entry.name,
        "path": display_path(entry.path),
        "objective": _type_of(values.get("objective")),
        "networks": ", ".join(_type_of(n) for n in networks.values()) if isinstance(networks, dict) else "",
        "engine": _type_of(values.get("engine")),
        "description": str(values.get("description", "")),
    }


def _enabled(stages: dict[str, Any]) -> list[str]:
    return [name for name, stage in stages.items() if not (isinstance(stage, dict) and stage.get("enabled") is False)]


def _type_of(section: Any) -> str:
    return str(section.get("type", "")) if isinstance(section, dict) else ""


def _recipe_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*.yaml")):
        if not any(part.startswith(("_", ".")) for part in path.relative_to(folder).parts):
            yield path


def find_recipe(reference: str) -> Path:
    """Return the file of a recipe given as a path or as a name from the catalogue.

    Raises:
        RecipeError: there is neither such a file nor such a name.
    """
    path = Path(reference).expanduser()
    if path.is_file():
        return path
    names = {entry.name: entry.path for entry in catalogue()}
    if reference in names:
        return names[reference]
    last_parts = {name.rpartition("/")[2]: name for name in names}
    suggestion = nearest(reference, list(names)) or last_parts.get(
        nearest(Path(reference).stem, list(last_parts)) or ""
    )
    raise RecipeError.of(
        f"there is no recipe {reference!r}",
        where="RECIPE",
        allowed=f"a YAML file, or one of the {len(names)} names that `sixfold recipes` lists",
        fix=f"did you mean `{suggestion}`?" if suggestion else "`sixfold recipes` lists the names",
    )
