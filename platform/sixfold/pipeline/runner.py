"""Running a pipeline: a stage whose inputs are unchanged is not run again, one that was interrupted goes on.

A stage's key is a hash of what it does and of the keys of the stages it reads; its output lies in ``<stage>-<key>``, so
that changed inputs make a new folder and nothing is overwritten. A record beside the folder says that it is finished.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from sixfold.errors import EnvironmentFault, SixfoldError
from sixfold.pipeline.config import HERE, CommandStage, PipelineConfig, StageConfig, TrainStage, fill
from sixfold.recipe.load import load_recipe
from sixfold.tracking.config import MLflowConfig
from sixfold.tracking.lineage import PARENT_TAG, STAGE_TAG, close_parent, open_parent, record_stage

_KEY_DIGITS = 12
_STATE = "pipeline.json"
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One stage with its references filled in.

    Attributes:
        name: its name.
        key: hash of what it does and reads.
        folder: where its output lies.
        command: the words after ``sixfold``.
        inputs: keys of the stages it reads.
        resumable: whether an unfinished output is gone on with.
    """

    name: str
    key: str
    folder: Path
    command: tuple[str, ...]
    inputs: Mapping[str, str]
    resumable: bool

    @property
    def record(self) -> Path:
        """The file that says the stage is finished."""
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def finished(self) -> bool:
        """Whether its output is complete."""
        return self.record.is_file() and self.folder.exists()


def plan(pipeline: PipelineConfig, root: Path) -> list[PlannedStage]:
    """Say what each stage would run, and where.

    Raises:
        RecipeError: a stage's recipe cannot be loaded; names the stage.
    """
    planned: dict[str, PlannedStage] = {}
    for name, stage in pipeline.stages.items():
        inputs = {other: planned[other].key for other in stage.references()}
        key = _key(name, stage, inputs)
        folder = root / f"{name}-{key}"
        folders = {**{other: str(part.folder) for other, part in planned.items()}, HERE: str(folder)}
        planned[name] = PlannedStage(
            name=name,
            key=key,
            folder=folder,
            command=_command(stage, folders),
            inputs=inputs,
            resumable=isinstance(stage, TrainStage) or stage.resumable,
        )
    return list(planned.values())


def run_pipeline(pipeline: PipelineConfig, root: Path, say: Say) -> int:
    """Run every stage that is not finished; return the exit code of the first that fails, else 0.

    Raises:
        RecipeError: a stage's recipe cannot be loaded.
        EnvironmentFault: the pipeline's folder cannot be written.
    """
    stages = plan(pipeline, root)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault.of(
            f"the pipeline's folder cannot be made: {error}", where=str(root), fix="name another with --run-dir"
        ) from error
    lineage = _Lineage(pipeline, root, say)
    code = 0
    for number, stage in enumerate(stages, start=1):
        where = f"stage {number} of {len(stages)}, {stage.name}"
        if stage.finished:
            say(f"{where}: finished before, in {stage.folder}")
            continue
        say(f"{where}: sixfold {' '.join(stage.command)}")
        started = time.monotonic()
        code = _run(stage, lineage.settings_of(pipeline.stages[stage.name], stage.name))
        if code:
            say(f"{where}: ended with exit code {code}; the same command goes on from here")
            break
        seconds = time.monotonic() - started
        _finish(stage, seconds)
        lineage.record(stage, seconds)
        say(f"{where}: done in {seconds:.0f} s, in {stage.folder}")
    lineage.close(finished=code == 0)
    return code


def _key(name: str, stage: StageConfig, inputs: Mapping[str, str]) -> str:
    """Hash a stage: its settings with references replaced by keys, and of a recipe all that it resolves to."""
    stand_ins = {**{other: f"<{key}>" for other, key in inputs.items()}, HERE: "<here>"}
    content: dict[str, Any] = {"sixfold": metadata.version("sixfold"), "inputs": dict(inputs)}
    if isinstance(stage, TrainStage):
        try:
            content["recipe"] = load_recipe(stage.recipe, _overrides(stage, stand_ins)).recipe.recipe_hash
        except SixfoldError as error:
            raise type(error)(*(replace(fault, what=f"stage {name}: {fault.what}") for fault in error.faults)) from None
    else:
        content["command"] = fill(list(stage.command), stand_ins)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_KEY_DIGITS]


def _overrides(stage: TrainStage, folders: dict[str, str]) -> list[str]:
    return [f"{key}={json.dumps(fill(value, folders))}" for key, value in stage.settings.items()]


def _command(stage: StageConfig, folders: dict[str, str]) -> tuple[str, ...]:
    if isinstance(stage, CommandStage):
        return tuple(fill(list(stage.command), folders))
    common = [stage.recipe, *_overrides(stage, folders), "--run-dir", folders[HERE]]
    if stage.profile is None:
        return ("run", *common, "--nproc", str(stage.nproc))
    settings = [part for name, value in stage.profile_settings.items() for part in ("--with", f"{name}={value}")]
    return ("submit", *common, "--to", stage.profile, *settings, "--key", "auto", "--retry", "--follow")


def _run(stage: PlannedStage, more: Sequence[str]) -> int:
    if stage.folder.exists() and not stage.resumable:
        shutil.rmtree(stage.folder)  # what an interrupted attempt left; commands refuse to write over it
    command = [sys.executable, "-m", "sixfold.cli.main", *stage.command, *more]
    child = subprocess.Popen(command)
    while True:
        with suppress(KeyboardInterrupt):  # the child got it too: it saves, ends, and tells by its exit code
            return child.wait()


def _finish(stage: PlannedStage, seconds: float) -> None:
    record = {
        "stage": stage.name,
        "key": stage.key,
        "inputs": dict(stage.inputs),
        "command": list(stage.command),
        "seconds": round(seconds, 1),
    }
    temporary = stage.record.with_suffix(".partial")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(stage.record)


class _Lineage:
    """The pipeline's parent run in MLflow; a store that is away costs the lineage, not the pipeline."""

    def __init__(self, pipeline: PipelineConfig, root: Path, say: Say) -> None:
        self._say = say
        self._config = pipeline.tracking if isinstance(pipeline.tracking, MLflowConfig) else None
        self._parent: str | None = None
        state = root / _STATE
        known = json.loads(state.read_text())["mlflow_run"] if state.is_file() else None
        if self._config is None:
            return
        try:
            self._parent = open_parent(self._config, name=pipeline.name, known=known)
        except Exception as error:  # MLflow lets errors of its database and HTTP libraries through
            self._say(f"the pipeline is not tracked in MLflow: {error}")
            return
        state.write_text(json.dumps({"pipeline": pipeline.name, "mlflow_run": self._parent}) + "\n")

    def settings_of(self, stage: StageConfig, name: str) -> list[str]:
        """Overrides that nest a training stage's run under the pipeline's."""
        if self._parent is None or self._config is None or isinstance(stage, CommandStage):
            return []
        tags = {PARENT_TAG: self._parent, STAGE_TAG: name}
        return [f"tracking.tags={json.dumps(tags)}", f"tracking.uri={self._config.uri}"]

    def record(self, stage: PlannedStage, seconds: float) -> None:
        """Write what a finished stage was made from."""
        if self._parent is None or self._config is None:
            return
        facts = {"key": stage.key, "folder": str(stage.folder), "inputs": json.dumps(dict(stage.inputs))}
        try:
            record_stage(
                self._config, self._parent, stage=stage.name, facts=facts, seconds=seconds, folder=stage.folder
            )
        except Exception as error:  # as above
            self._say(f"stage {stage.name} is not recorded in MLflow: {error}")

    def close(self, *, finished: bool) -> None:
        """Mark the parent run as ended."""
        if self._parent is None or self._config is None:
            return
        with suppress(Exception):  # as above; the stages' own records are whole
            close_parent(self._config, self._parent, finished=finished)
