"""What a network from another run is, once that run's own recipe has been read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sixfold.config.base import Component
from sixfold.models.settings import NetworkSettings


@dataclass(frozen=True, kw_only=True)
class TrainedNetwork:
    """One role of another run.

    Attributes:
        architecture: the network's own settings.
        objective: what it was trained for, with its path and prediction.
        run: that run's folder; None where only a recipe is known (dry runs and plans).
        role: which of that run's roles.
        averaged: whether its averaged weights are meant.
        step: the step whose checkpoint is meant; None is the newest.
        codec: the codec whose latents it was trained on; None where it was trained on the data as they are.
    """

    architecture: NetworkSettings
    objective: Component
    run: Path | None
    role: str
    averaged: bool
    step: int | None = None
    codec: NetworkSettings | TrainedNetwork | None = None


NetworksConfig = Mapping[str, NetworkSettings | TrainedNetwork]
"""What objectives and samplers get: by name in the recipe, a network's settings or whose weights it takes."""


def unlike(
    one: NetworkSettings | TrainedNetwork, other: NetworkSettings | TrainedNetwork
) -> list[tuple[str, Any, Any]]:
    """Return what keeps two denoisers from making the same images from the same conditions: setting, its two values."""
    pairs = [  # no classes, or no text, is what a network without the setting has
        (name, getattr(architecture_of(one), name, 0), getattr(architecture_of(other), name, 0))
        for name in ("image_size", "channels", "classes", "text_width", "pooled_width")
    ]
    return [(name, own, theirs) for name, own, theirs in pairs if own != theirs]


def architecture_of(network: NetworkSettings | TrainedNetwork) -> NetworkSettings:
    """Return a network's own settings, whoever trained it."""
    return network.architecture if isinstance(network, TrainedNetwork) else network
