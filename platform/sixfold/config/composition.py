"""Composing a recipe from layers: files that stand on others (``base:``), then overrides.

Mappings merge key by key; everything else is replaced. A mapping whose ``type`` changes is replaced as a whole, since
the settings of one kind of optimizer, engine or network mean nothing to another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sixfold.config.loading import read_yaml
from sixfold.config.provenance import KeyPath, Layer, Place, display_path
from sixfold.errors import Fault, RecipeError

BASE = "base"
"""The key under which a file names the file or files it stands on."""


def merge(below: Layer, above: Layer) -> Layer:
    """Return ``below`` changed by ``above``; neither argument is touched."""
    places = dict(below.places)
    values = _merge(below.values, above.values, (), places)
    places.update(above.places)
    return Layer(values, places)


def _merge(below: Any, above: Any, path: KeyPath, places: dict[KeyPath, Place]) -> Any:
    if isinstance(below, dict) and isinstance(above, dict) and not _changes_type(below, above):
        merged = dict(below)
        for key, value in above.items():
            merged[key] = _merge(below[key], value, (*path, key), places) if key in below else value
        return merged
    if isinstance(below, list) and isinstance(above, dict) and _indexes(above, len(below)):
        items = list(below)
        for key, value in above.items():
            items[int(key)] = _merge(below[int(key)], value, (*path, key), places)
        return items
    for other in [other for other in places if other[: len(path)] == path]:
        del places[other]
    return above


def _changes_type(below: dict[str, Any], above: dict[str, Any]) -> bool:
    return "type" in above and "type" in below and above["type"] != below["type"]


def _indexes(above: dict[str, Any], length: int) -> bool:
    """Whether the keys of an override address elements of a list (``data.mixture.0.weight=2``)."""
    return bool(above) and all(key.isdecimal() and int(key) < length for key in above)


def compose_file(path: Path) -> Layer:
    """Read a recipe file and every base below it, and merge them.

    Raises:
        RecipeError: with all faults met in all files: unreadable files, bad YAML, duplicate keys, cycles of bases.
    """
    faults: list[Fault] = []
    layer = _compose(path, (), faults)
    if faults:
        raise RecipeError(*faults)
    return layer


def _compose(path: Path, chain: tuple[Path, ...], faults: list[Fault]) -> Layer:
    own, own_faults = read_yaml(path)
    faults.extend(own_faults)
    names = own.values.pop(BASE, [])
    merged = Layer()
    for index, name in enumerate(names if isinstance(names, list) else [names]):
        where = own.places.get((BASE, str(index)), own.places[(BASE,)])
        fault = _base_fault(path, name, (*chain, path.resolve()))
        if fault is not None:
            what, fix = fault
            faults.append(Fault(what=what, where=str(where), fix=fix))
            continue
        merged = merge(merged, _compose(path.parent / name, (*chain, path.resolve()), faults))
    places = {key: place for key, place in own.places.items() if key[:1] != (BASE,)}
    return merge(merged, Layer(own.values, places))


def _base_fault(path: Path, name: Any, chain: tuple[Path, ...]) -> tuple[str, str] | None:
    """Return what is wrong with one base, and the fix, or None."""
    if not isinstance(name, str):
        return f"base must name a file or a list of files, got {name!r}", "write a path relative to this file"
    base = (path.parent / name).resolve()
    if base in chain:
        cycle = " -> ".join(display_path(link) for link in (*chain[chain.index(base) :], base))
        return f"bases form a cycle: {cycle}", "remove one of these base lines"
    if not base.is_file():
        return (
            f"the base {name} does not exist (looked for {display_path(base)})",
            "write a path relative to this file",
        )
    return None
