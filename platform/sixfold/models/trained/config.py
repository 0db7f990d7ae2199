"""A network that another run trained: a teacher, a codec, a starting point."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sixfold.models.settings import NetworkSettings


class TrainedConfig(NetworkSettings):
    """Architecture, objective and weights of a network are read from the run that trained it."""

    implementation: ClassVar[str] = "sixfold.models.trained.network:TrainedNetwork"

    type: Literal["trained"] = "trained"
    run: str = Field(
        min_length=1,
        description="The run: a folder, a run id, or run://<recipe>@latest (dashes may stand for slashes).",
    )
    role: str | None = Field(
        default=None, min_length=1, description="Which of that run's roles; its first trainable one where absent."
    )
    averaged: bool = Field(default=True, description="Its averaged weights, where that run keeps an average.")
    step: int | None = Field(
        default=None, ge=1, description="Take the checkpoint of this step; the newest that verifies where absent."
    )
    recipe: str | None = Field(
        default=None,
        min_length=1,
        description="The recipe that trains it: tells the architecture to a dry run or a plan before the run exists.",
    )
