"""How long to train and what the loop does on the way."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field, model_validator

from sixfold.config.base import Config
from sixfold.engine.averaging_config import AverageConfig


def _admit_ema_decay(schema: dict[str, Any]) -> None:
    """Let editors know the short spelling of a constant decay."""
    decay = {"description": "Short for ema: {type: constant, decay: ...}."}
    schema["properties"]["ema_decay"] = decay | {"anyOf": [{"type": "number"}, {"type": "null"}]}


class TrainConfig(Config):
    """Length of training, the moving average of the parameters, and what the loop tolerates and reports."""

    model_config = ConfigDict(json_schema_extra=_admit_ema_decay)

    steps: int = Field(ge=1, description="Optimizer steps to take in all, restarts included.")
    ema: AverageConfig | None = Field(
        default=None,
        description="Moving averages of the parameters, one of which is sampled and evaluated; null: none. "
        "`ema_decay: 0.9999` is short for `ema: {type: constant, decay: 0.9999}`.",
    )
    max_consecutive_skips: int = Field(
        default=10,
        ge=0,
        description="Steps in a row that may be skipped for a non-finite loss or gradient; one more ends training.",
    )
    log_every_steps: int = Field(
        default=10, ge=1, description="Optimizer steps between two lines of the event log and the tracker."
    )

    hang_after_s: float | None = Field(
        default=None,
        gt=0.0,
        description="Seconds without a finished step (evaluation and saving included) after which ranks leave their "
        "stacks and end, so that the launcher restarts them; null: half an hour, or 100 median steps if that is more.",
    )

    @model_validator(mode="before")
    @classmethod
    def _spell_out_decay(cls, values: Any) -> Any:
        """``ema_decay`` is how a constant decay was written before there were other averages."""
        if not isinstance(values, dict) or "ema_decay" not in values:
            return values
        decay = values["ema_decay"]
        if values.get("ema") is not None:
            raise ValueError("expected either ema or ema_decay, got both; write ema={type: constant, decay: ...} alone")
        if decay is not None and not (isinstance(decay, int | float) and 0.0 <= decay < 1.0):
            raise ValueError(f"expected ema_decay from 0 and less than 1, got {decay!r}; 0.9999 is usual")
        rest = {key: value for key, value in values.items() if key != "ema_decay"}
        return rest if decay is None else {**rest, "ema": {"type": "constant", "decay": decay}}
