"""A pipeline in MLflow: one parent run, under which its stages' runs are nested, with what went into each."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from sixfold.tracking.config import MLflowConfig
from sixfold.tracking.mlflow import open_client
from sixfold.tracking.names import tag_value
from sixfold.tracking.settings import Cursor, MirrorSettings
from sixfold.tracking.tracker import replay

PARENT_TAG = "mlflow.parentRunId"
STAGE_TAG = "sixfold.stage"
_SHOWN = (".png", ".md", ".json", ".csv")
_LARGEST_ARTIFACT_BYTES = 8 << 20


class Lineage:
    """A pipeline's run and, under it, one run a stage: those of commands are made here, training makes its own.

    Args:
        config: where.
        pipeline: name of the pipeline.
        known: its run, if it has one: it is marked as running again.
        stages: runs of stages that are known, by the stages' keys.
    """

    def __init__(
        self, config: MLflowConfig, *, pipeline: str, known: str | None, stages: Mapping[str, str] | None = None
    ) -> None:
        self.config = config
        self.stages = dict(stages or {})
        self._client = open_client(config.uri)
        self._pipeline = pipeline
        if known is not None:
            self._client.update_run(known, status="RUNNING")
        self.parent: str = known or self._new_run(config.run_name or pipeline, {})

    def open_stage(self, name: str, key: str) -> str:
        """Return the run of a stage that is a command, marked as running."""
        if key in self.stages:
            self._client.update_run(self.stages[key], status="RUNNING")
        else:
            self.stages[key] = self._new_run(name, {PARENT_TAG: self.parent, STAGE_TAG: name})
        return self.stages[key]

    def fail_stage(self, key: str) -> None:
        """Mark a command's run as failed; training marks its own."""
        if key in self.stages:
            self._client.set_terminated(self.stages[key], status="FAILED")

    def record_stage(
        self,
        name: str,
        key: str,
        *,
        inputs: Mapping[str, str],
        output: str,
        kind: str,
        seconds: float,
        folder: Path,
    ) -> str:
        """Write what a finished stage was made from, what it left, how long it took, and the tables and pictures of it.

        Returns the stage's run.
        """
        run = self._training_run(name, folder) or self.open_stage(name, key)
        facts = {"key": key, "folder": str(folder), "inputs": json.dumps(dict(inputs)), "output": f"{kind}:{output}"}
        for fact, value in facts.items():
            self._client.set_tag(run, f"sixfold.{fact}", tag_value(value))
            self._client.set_tag(self.parent, f"stage.{name}.{fact}", tag_value(value))
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.suffix in _SHOWN and path.stat().st_size <= _LARGEST_ARTIFACT_BYTES:
                self._client.log_artifact(self.parent, str(path), f"stages/{name}")
        self._client.log_metric(self.parent, f"seconds/{name}", seconds, timestamp=int(time.time() * 1000), step=0)
        if run == self.stages.get(key):
            self._client.set_terminated(run, status="FINISHED")
        return run

    def close(self, *, finished: bool) -> None:
        """Mark the pipeline's run as finished or failed."""
        self._client.set_terminated(self.parent, status="FINISHED" if finished else "FAILED")

    def _training_run(self, name: str, folder: Path) -> str | None:
        """Return the run that training made of its own, nested under this pipeline's; None where it made none.

        What the store has not received of it is sent now.
        """
        settings = MirrorSettings.read(folder)
        if settings is None:
            return None
        replay(folder)
        run = Cursor.read(folder, settings.mirror).run_id
        assert run is not None, "a run that was sent has a number"
        self._client.set_tag(run, PARENT_TAG, self.parent)
        self._client.set_tag(run, STAGE_TAG, name)
        return run

    def _new_run(self, name: str, tags: Mapping[str, str]) -> str:
        experiment = self.config.experiment or self._pipeline
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = self._client.create_experiment(experiment) if found is None else found.experiment_id
        run = self._client.create_run(experiment_id, run_name=name, tags={"sixfold.pipeline": self._pipeline, **tags})
        made: str = run.info.run_id
        return made
