"""A pipeline in MLflow: one parent run, under which its stages' runs are nested, with what went into each."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from sixfold.tracking.config import MLflowConfig
from sixfold.tracking.mlflow import open_client
from sixfold.tracking.names import tag_value

PARENT_TAG = "mlflow.parentRunId"
STAGE_TAG = "sixfold.stage"
_SHOWN = (".png", ".md", ".json", ".csv")
_LARGEST_ARTIFACT_BYTES = 8 << 20


def open_parent(config: MLflowConfig, *, name: str, known: str | None) -> str:
    """Return the id of a pipeline's run: the ``known`` one, marked as running again, or a new one."""
    client = open_client(config.uri)
    if known is not None:
        client.update_run(known, status="RUNNING")
        return known
    experiment = config.experiment or name
    found = client.get_experiment_by_name(experiment)
    experiment_id = client.create_experiment(experiment) if found is None else found.experiment_id
    run = client.create_run(experiment_id, run_name=config.run_name or name, tags={"sixfold.pipeline": name})
    parent: str = run.info.run_id
    return parent


def record_stage(
    config: MLflowConfig, parent: str, *, stage: str, facts: Mapping[str, str], seconds: float, folder: Path
) -> None:
    """Write what a finished stage was made from, how long it took, and the tables and pictures it made."""
    client = open_client(config.uri)
    for fact, value in facts.items():
        client.set_tag(parent, f"stage.{stage}.{fact}", tag_value(value))
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix in _SHOWN and path.stat().st_size <= _LARGEST_ARTIFACT_BYTES:
            client.log_artifact(parent, str(path), f"stages/{stage}")
    client.log_metric(parent, f"seconds/{stage}", seconds, timestamp=int(time.time() * 1000), step=0)


def close_parent(config: MLflowConfig, parent: str, *, finished: bool) -> None:
    """Mark the pipeline's run as finished or failed."""
    open_client(config.uri).set_terminated(parent, status="FINISHED" if finished else "FAILED")
