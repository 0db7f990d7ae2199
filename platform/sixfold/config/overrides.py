"""Dotted overrides: ``train.steps=5``, ``engine={type: fsdp}``, ``data.mixture.0.weight=2``, ``roles.critic=null``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sixfold.config.loading import parse_value
from sixfold.config.provenance import KeyPath, Layer, Place
from sixfold.errors import Fault

_KEY = re.compile(r"[^\s.=]+(?:\.[^\s.=]+)*\Z")


def parse_overrides(overrides: Sequence[str]) -> tuple[Layer, list[Fault]]:
    """Parse ``a.b.c=value`` arguments into one layer; of two for the same key the later one wins.

    Values follow the same YAML rules as files. All overrides merge into the recipe at once, so ``optimizer.lr=1
    optimizer.type=muon`` means the same in either order.
    """
    values: dict[str, Any] = {}
    places: dict[KeyPath, Place] = {}
    faults: list[Fault] = []
    for text in overrides:
        key, equals, spelled = text.partition("=")
        if not equals or not _KEY.match(key):
            faults.append(_malformed(text))
            continue
        path = tuple(key.split("."))
        value, value_places, value_faults = parse_value(spelled, Place(f"override {text}"), path)
        faults.extend(value_faults)
        _assign(values, places, path, value)
        places.update(value_places)
    return Layer(values, places), faults


def _malformed(text: str) -> Fault:
    return Fault(
        what=f"{text!r} is not an override",
        where=f"override {text}",
        allowed="key=value with a dotted key, such as train.steps=100 or engine.type=fsdp",
        fix="write the key, an equals sign and the value without spaces around it",
    )


def _assign(values: dict[str, Any], places: dict[KeyPath, Place], path: tuple[str, ...], value: Any) -> None:
    """Set ``path`` to ``value``, making mappings on the way and dropping what an earlier override put there."""
    node = values
    for depth, key in enumerate(path[:-1], start=1):
        if not isinstance(node.get(key), dict):
            _forget(places, path[:depth])
            node[key] = {}
        node = node[key]
    _forget(places, path)
    node[path[-1]] = value


def _forget(places: dict[KeyPath, Place], prefix: KeyPath) -> None:
    for path in [path for path in places if path[: len(prefix)] == prefix]:
        del places[path]
