"""Settings of the trackers: where a run is mirrored for people to look at. The run folder itself is always complete."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from sixfold.config.base import Component

_URI_SCHEMES = ("sqlite:///", "http://", "https://", "postgresql", "mysql", "mssql", "databricks")


class _TrackingSettings(Component):
    """What the event log holds, however it is mirrored."""

    system_metrics: bool = Field(
        default=True, description="Sample CPU, memory, disk, network and GPU use into system/* while training."
    )
    system_metrics_interval_s: float = Field(
        default=10.0, ge=0.5, le=3600.0, description="Seconds between two samples of the system metrics."
    )


class MLflowConfig(_TrackingSettings):
    """Mirror the run in MLflow: metrics, parameters, sample grids, texts, and where the model lies."""

    implementation: ClassVar[str] = "sixfold.tracking.tracker:MLflowTracker"

    type: Literal["mlflow"] = Field(default="mlflow", description="Mirror the event log in an MLflow store or server.")
    uri: str = Field(
        default="sqlite:///mlflow.db",
        min_length=1,
        description="MLflow tracking URI: sqlite:///FILE, or http(s)://HOST:PORT of a server.",
    )
    experiment: str | None = Field(
        default=None, min_length=1, max_length=500, description="MLflow experiment; by default the recipe's name."
    )
    run_name: str | None = Field(
        default=None, min_length=1, max_length=250, description="Name shown for the run; by default its run id."
    )
    tags: dict[str, str] = Field(default_factory=dict, description="Further tags of the MLflow run.")
    close_timeout_s: float = Field(
        default=30.0,
        ge=0.0,
        le=3600.0,
        description="Seconds the end of a run may wait for the server; what is left is sent by the next attempt.",
    )

    @field_validator("uri")
    @classmethod
    def _is_a_database_or_server(cls, uri: str) -> str:
        if uri.startswith(_URI_SCHEMES):
            return uri
        raise ValueError(
            f"uri must start with one of {', '.join(_URI_SCHEMES)}, got {uri!r}; "
            "MLflow no longer keeps runs in plain folders, so name a database file: sqlite:///mlflow.db"
        )


class JsonlConfig(_TrackingSettings):
    """Keep the run folder's event log only; needs no MLflow."""

    implementation: ClassVar[str] = "sixfold.tracking.tracker:NoTracker"

    type: Literal["jsonl"] = Field(
        default="jsonl", description="Write events.jsonl in the run folder and nothing else."
    )


TrackingConfig = Annotated[MLflowConfig | JsonlConfig, Field(discriminator="type")]
