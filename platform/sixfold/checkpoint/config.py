"""Settings of checkpointing; importing them imports no torch."""

from __future__ import annotations

from pydantic import Field

from sixfold.config.base import Config


class CheckpointConfig(Config):
    """When checkpoints are written, how they are proved, and which of them are kept."""

    every_steps: int = Field(
        default=1000, ge=1, description="Optimizer steps between checkpoints; the last step is always saved."
    )
    keep: int = Field(
        default=3,
        ge=1,
        description="How many of the newest checkpoints to keep. An older one goes only once a newer one has verified.",
    )
    keep_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps between milestones: a checkpoint whose step is a multiple of this is never deleted.",
    )
    asynchronous: bool = Field(
        default=True,
        description="Write in the background: a step waits only while the state is copied to CPU memory.",
    )
    verify: bool = Field(
        default=True,
        description=(
            "Read every file of a new checkpoint back and compare hashes before it counts and an older one is deleted. "
            "Without it only sizes are compared; hashes are compared on resume in any case."
        ),
    )
    timeout_s: float = Field(
        default=1800.0,
        gt=0.0,
        description="Seconds that ranks wait for each other while writing, before a save is reported as failed.",
    )
