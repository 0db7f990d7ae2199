"""How long to train and what the loop does on the way."""

from __future__ import annotations

from pydantic import Field

from sixfold.config.base import Config


class TrainConfig(Config):
    """Length of training, the moving average of the parameters, and what the loop tolerates and reports."""

    steps: int = Field(ge=1, description="Optimizer steps to take in all, restarts included.")
    ema_decay: float | None = Field(
        default=None,
        ge=0.0,
        lt=1.0,
        description="Decay per step of the moving average that is sampled and evaluated (0.9999 is usual); null: none.",
    )
    max_consecutive_skips: int = Field(
        default=10,
        ge=0,
        description="Steps in a row that may be skipped for a non-finite loss or gradient; one more ends training.",
    )
    log_every_steps: int = Field(
        default=10, ge=1, description="Optimizer steps between two lines of the event log and the tracker."
    )
