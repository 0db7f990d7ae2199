"""Which text encoders an objective uses, and how their features are put together; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from sixfold.config.base import Config


class EncoderConfig(Config):
    """One text encoder: a role that carries the name of its network."""

    frozen: bool = Field(False, description="Whether its weights stay as they are; else it trains with the denoiser.")
    drop: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Probability of giving it the null caption, drawn independently; null: objective.label_drop.",
    )
    beside: bool = Field(
        False,
        description="Put its features beside those of the encoder before it, token by token; else its tokens follow.",
    )


EncodersConfig = Annotated[
    Mapping[str, EncoderConfig], Field(strict=False, description="Text encoders by their name in `networks`, in order.")
]


def trained_encoders(encoders: Mapping[str, EncoderConfig]) -> dict[str, str]:
    """The roles of encoders that train, each with the name of its network, which is the same."""
    return {name: name for name, encoder in encoders.items() if not encoder.frozen}
