"""What every network's settings tell the rest of the platform: what the network can do, and what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

from sixfold.config.base import Component

Capability = Literal[
    "denoiser",
    "uncertainty",
    "language_model",
    "codec",
    "discriminator",
    "text_encoder",
    "features",
    "projection",
    "hidden_tokens",
]
"""What an objective may ask of a network; a new kind of network adds its word here."""


class Field(NamedTuple):
    """One field of a batch: the shape of one sample, and its type."""

    shape: tuple[int, ...]
    dtype: Literal["float32", "int64"]


class SampleLengths(NamedTuple):
    """What the data's settings add to a network's own to fix the shape of a sample, in tokens."""

    sequence_length: int | None
    caption_length: int


class NetworkSettings(Component):
    """Base of every network's settings."""

    provides: ClassVar[frozenset[Capability]] = frozenset()
    """What objectives may use the network as."""

    pretrained: ClassVar[bool] = False
    """Whether the implementation comes with its weights, is built as a plain module, and can only be frozen."""

    stand_in: ClassVar[str | None] = None
    """Where the class stands, as ``"package.module:attribute"``, that a dry run builds in a pretrained network's place:
    constructed from the same settings, it needs no weights and returns zeros of the same shapes."""

    weights_from: ClassVar[str | None] = None
    """Where the function stands, as ``"package.module:attribute"``, that makes the weights of a network which no recipe
    trains: called as ``make(settings, split)``, where ``split()`` reads the training split's images and labels, it
    returns full parameters by name."""

    def inputs(self, lengths: SampleLengths) -> Mapping[str, Field]:
        """The fields of a batch that the network reads, by name; none for one that reads other networks' outputs."""
        return {}

    @property
    def tokens(self) -> int | None:
        """Tokens that one sample occupies in the network; None where the data decide."""
        return None
