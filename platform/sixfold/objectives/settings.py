"""What every objective's settings tell the rest of the platform: its roles, the networks it needs, what fits it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sixfold.config.base import Component
from sixfold.models.settings import Capability


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What goes together with one type of objective.

    Attributes:
        modality: what its data hold.
        samplers: types of samplers that can draw from what it trains; the first is suggested.
        metrics: evaluation metrics that apply.
    """

    modality: Literal["image", "text"]
    samplers: tuple[str, ...]
    metrics: tuple[str, ...]


class ObjectiveSettings(Component):
    """Base of every objective's settings."""

    fit: ClassVar[Fit]

    forward_mode: ClassVar[bool] = False
    """Whether it takes forward-mode derivatives of the networks it trains."""

    @property
    def needs(self) -> Mapping[str, Capability]:
        """The names in `networks` that this objective uses, and what each must be able to do."""
        raise NotImplementedError

    @property
    def network_names(self) -> tuple[str, ...]:
        """The names in `networks` that this objective uses."""
        return tuple(self.needs)

    @property
    def trains(self) -> Mapping[str, str]:
        """The trainable roles, and the name in `networks` of each one's network; the main one first."""
        raise NotImplementedError

    def as_trained(self, networks_config: Mapping[str, Any]) -> Component:
        """What another run is told that takes a network from this one: these settings with nothing left to inherit."""
        return self

    @property
    def role_names(self) -> tuple[str, ...]:
        """The trainable roles; `roles.<role>` in a recipe overrides their settings."""
        return tuple(self.trains)

    @property
    def latents_of(self) -> str | None:
        """The name in `networks` of the codec whose latents are learned; None where the data are taken as they are."""
        return None
