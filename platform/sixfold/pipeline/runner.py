"""Running a pipeline: a stage whose inputs are unchanged is not run again, one that was interrupted goes on.

A stage's key is a hash of what it does and of the contents that it reads: of other stages' outputs, and of data sets,
runs and files from outside. Its output lies in ``<stage>-<key>``, so that changed inputs make a new folder and nothing
is overwritten. A record beside the folder says that it is finished, and what it left; where that is no longer there as
it was, the stage is run again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from sixfold.config.base import Config
from sixfold.errors import EnvironmentFault, SixfoldError
from sixfold.pipeline.config import HERE, CommandStage, PipelineConfig, StageConfig, TrainStage, fill
from sixfold.pipeline.content import Output, changed_files, outside, read_output
from sixfold.recipe.load import load_recipe
from sixfold.recipe.recipe import Recipe
from sixfold.tracking.config import MLflowConfig
from sixfold.tracking.lineage import PARENT_TAG, STAGE_TAG, Lineage

_KEY_DIGITS = 12
_STATE = "pipeline.json"
_SHOWN_FILES = 3
Say = Callable[[str], None]


class StageRecord(Config):
    """The file beside a stage's folder: how it was made, and what it left."""

    stage: str = Field(description="Its name.")
    key: str = Field(description="Hash of what it does and reads.")
    inputs: dict[str, str] = Field(description="By stage that it reads, the hash of its output.")
    command: tuple[str, ...] = Field(description="The words after `sixfold`.")
    seconds: float = Field(description="How long it took.")
    output: Output = Field(description="What it left.")
    mlflow_run: str | None = Field(None, description="Its run in MLflow, once that has all of this.")


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One stage with its references filled in.

    Attributes:
        name: its name.
        key: hash of what it does and reads; while a stage that it reads is not finished, what that will leave is not
            known, and the key will be another then.
        folder: where its output lies.
        command: the words after ``sixfold``.
        inputs: by stage that it reads, the hash of its output (of one that is not finished, its key).
        resumable: whether an unfinished output is gone on with.
    """

    name: str
    key: str
    folder: Path
    command: tuple[str, ...]
    inputs: Mapping[str, str]
    resumable: bool

    @property
    def record_file(self) -> Path:
        """The file that says the stage is finished."""
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def record(self) -> StageRecord | None:
        """What is known of its last successful end; None where there was none."""
        try:
            return StageRecord.model_validate_json(self.record_file.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    @property
    def changed(self) -> list[str]:
        """The files of its output that are no longer what it left."""
        return [] if (record := self.record) is None else changed_files(self.folder, record.output)

    @property
    def finished(self) -> bool:
        """Whether its output is complete, and what it left."""
        return self.record is not None and not self.changed

    def keep(self, record: StageRecord) -> None:
        """Write the record."""
        temporary = self.record_file.with_suffix(".partial")
        temporary.write_text(record.model_dump_json(indent=2) + "\n")
        temporary.replace(self.record_file)


def plan(pipeline: PipelineConfig, root: Path) -> list[PlannedStage]:
    """Say what each stage would run, and where.

    Raises:
        RecipeError: a stage's recipe cannot be loaded; names the stage.
    """
    planned: dict[str, PlannedStage] = {}
    contents: dict[str, str] = {}
    for name, stage in pipeline.stages.items():
        inputs = {other: contents[other] for other in stage.references()}
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
        record = planned[name].record if planned[name].finished else None
        contents[name] = key if record is None else record.output.sha256
    return list(planned.values())


def run_pipeline(pipeline: PipelineConfig, root: Path, say: Say) -> int:
    """Run every stage that is not finished; return the exit code of the first that fails, else 0.

    Raises:
        RecipeError: a stage's recipe cannot be loaded.
        EnvironmentFault: the pipeline's folder cannot be written.
        DataError: a stage ended well and left nothing.
    """
    plan(pipeline, root)  # so that faults of later stages are found before the first is run
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault.of(
            f"the pipeline's folder cannot be made: {error}", where=str(root), fix="name another with --run-dir"
        ) from error
    tracked = _Tracked(pipeline, root, say)
    code = 0
    for number, name in enumerate(pipeline.stages):
        stage = plan(pipeline, root)[number]  # the stages before it are finished, so that its key is final
        code = _turn(
            stage, pipeline.stages[name], tracked, say, f"stage {number + 1} of {len(pipeline.stages)}, {name}"
        )
        if code:
            break
    tracked.close(finished=code == 0)
    return code


def _turn(stage: PlannedStage, config: StageConfig, tracked: _Tracked, say: Say, where: str) -> int:
    """Run a stage unless it is finished; return its exit code."""
    if stage.finished:
        say(f"{where}: finished before, in {stage.folder}")
        tracked.catch_up(stage)
        return 0
    if changed := stage.changed:
        shown = ", ".join(changed[:_SHOWN_FILES]) + (", ..." if len(changed) > _SHOWN_FILES else "")
        say(f"{where}: run again, since {len(changed)} files of its output are not what it left: {shown}")
        stage.record_file.unlink()
        if isinstance(config, CommandStage):  # training finds its own newest checkpoint that verifies
            shutil.rmtree(stage.folder, ignore_errors=True)
    say(f"{where}: sixfold {' '.join(stage.command)}")
    more = tracked.begin(stage, config)
    started = time.monotonic()
    code = _run(stage, more)
    if code:
        tracked.fail(stage)
        say(f"{where}: ended with exit code {code}; the same command goes on from here")
        return code
    seconds = time.monotonic() - started
    stage.keep(
        StageRecord(
            stage=stage.name,
            key=stage.key,
            inputs=dict(stage.inputs),
            command=stage.command,
            seconds=round(seconds, 1),
            output=read_output(stage.folder),
        )
    )
    tracked.catch_up(stage)
    say(f"{where}: done in {seconds:.0f} s, in {stage.folder}")
    return 0


def _key(name: str, stage: StageConfig, inputs: Mapping[str, str]) -> str:
    """Hash a stage: its settings with contents in the place of references, and what it reads from outside."""
    stand_ins = {**{other: f"<{content}>" for other, content in inputs.items()}, HERE: "<here>"}
    content: dict[str, Any] = {"sixfold": metadata.version("sixfold"), "inputs": dict(inputs)}
    if isinstance(stage, TrainStage):
        try:
            recipe = load_recipe(stage.recipe, _overrides(stage, stand_ins)).recipe
        except SixfoldError as error:
            raise type(error)(*(replace(fault, what=f"stage {name}: {fault.what}") for fault in error.faults)) from None
        content["recipe"], paths = recipe.recipe_hash, set(_paths_of(recipe))
    else:
        content["command"] = fill(list(stage.command), stand_ins)
        paths = {word for word in content["command"] if "/" in word}
    content["outside"] = {path: found for path in sorted(paths) if (found := outside(path)) is not None}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_KEY_DIGITS]


def _paths_of(recipe: Recipe) -> Iterator[str]:
    """The data of a recipe, and whatever else of its settings may be a path."""
    yield from recipe.data.paths
    if recipe.evaluation is not None and recipe.evaluation.reference is not None:
        yield recipe.evaluation.reference
    pending: list[object] = [recipe.model_dump(mode="json", exclude={"name", "description", "tracking"})]
    while pending:
        value = pending.pop()
        if isinstance(value, str) and "/" in value:
            yield value
        elif isinstance(value, dict | list):
            pending += value.values() if isinstance(value, dict) else value


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


class _Tracked:
    """The pipeline and its stages in MLflow; a store that is away costs nothing now, and is told when it is back."""

    def __init__(self, pipeline: PipelineConfig, root: Path, say: Say) -> None:
        self._say, self._state, self._config = say, root / _STATE, pipeline.tracking
        self._lineage: Lineage | None = None
        if not isinstance(pipeline.tracking, MLflowConfig):
            return
        known = json.loads(self._state.read_text()) if self._state.is_file() else {}
        try:
            self._lineage = Lineage(
                pipeline.tracking, pipeline=pipeline.name, known=known.get("mlflow_run"), stages=known.get("stages", {})
            )
            self._keep()
        except Exception as error:  # MLflow lets errors of its database and HTTP libraries through
            self._say(f"the pipeline is not tracked in MLflow: {error}")

    def begin(self, stage: PlannedStage, config: StageConfig) -> list[str]:
        """Open a command's run; of training, return overrides that nest its own run under the pipeline's."""
        if isinstance(config, TrainStage):
            where = [f"tracking.uri={self._config.uri}"] if isinstance(self._config, MLflowConfig) else []
            tags = {} if self._lineage is None else {PARENT_TAG: self._lineage.parent, STAGE_TAG: stage.name}
            return [*where, *([f"tracking.tags={json.dumps(tags)}"] if tags else [])]
        if self._lineage is not None:
            with self._told(stage):
                self._lineage.open_stage(stage.name, stage.key)
                self._keep()
        return []

    def fail(self, stage: PlannedStage) -> None:
        """Mark a command's run as failed."""
        if self._lineage is not None:
            with self._told(stage):
                self._lineage.fail_stage(stage.key)

    def catch_up(self, stage: PlannedStage) -> None:
        """Tell what a finished stage was made from and what it left, unless that has been told."""
        record = stage.record
        if self._lineage is None or record is None or record.mlflow_run is not None:
            return
        with self._told(stage):
            run = self._lineage.record_stage(
                stage.name,
                stage.key,
                inputs=record.inputs,
                output=record.output.sha256,
                kind=record.output.kind,
                seconds=record.seconds,
                folder=stage.folder,
            )
            self._keep()
            stage.keep(record.model_copy(update={"mlflow_run": run}))

    def close(self, *, finished: bool) -> None:
        """Mark the parent run as ended."""
        if self._lineage is not None:
            with suppress(Exception):  # as above; the stages' own records are whole
                self._lineage.close(finished=finished)

    def _keep(self) -> None:
        if self._lineage is not None:
            known = {"mlflow_run": self._lineage.parent, "stages": self._lineage.stages}
            self._state.write_text(json.dumps(known) + "\n")

    @contextmanager
    def _told(self, stage: PlannedStage) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # as above
            self._say(f"stage {stage.name} is not recorded in MLflow: {error}; it will be when this is run again")
