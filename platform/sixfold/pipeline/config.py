"""What a pipeline file says: stages that are run in turn, each from the outputs of earlier ones; torch-free.

``stages.<name>=null`` leaves a stage out, ``enabled: false`` until it is asked for; commands that take any number of
stages, such as a table of runs, lose the words that refer to them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from sixfold.config.base import Config
from sixfold.tracking.config import MLflowConfig, TrackingConfig

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
HERE = "here"
"""``{here}`` in a command is the stage's own output folder, ``{name}`` that of the stage of that name."""

_REFERENCE = re.compile(r"\{([a-z][a-z0-9-]*)\}")


class _Stage(Config):
    """What every stage has."""

    enabled: bool = Field(
        True, description="Whether it is run; false: only with stages.<name>.enabled=true, or with all_stages."
    )
    after: tuple[Name, ...] = Field((), strict=False, description="Stages to wait for that no setting refers to.")

    def references(self) -> list[str]:
        """The other stages whose outputs this one reads, in order of mention."""
        mentioned = [name for text in _texts(self.model_dump()) for name in _REFERENCE.findall(text) if name != HERE]
        return list(dict.fromkeys([*self.after, *mentioned]))


class TrainStage(_Stage):
    """Train a recipe; the output is its run folder."""

    type: Literal["train"] = Field("train", description="Train a recipe; the output is the run folder.")
    recipe: str = Field(min_length=1, description="A recipe file or name.")
    settings: dict[str, JsonValue] = Field(
        default_factory=dict, description="Overrides by dotted key; {stage} stands for a stage's output folder."
    )
    nproc: int = Field(1, ge=1, description="Ranks on this machine, where `profile` is not given.")
    profile: str | None = Field(None, min_length=1, description="Submit it to this cluster profile, and follow it.")
    profile_settings: dict[str, JsonValue] = Field(
        default_factory=dict, description="Overrides of the profile, such as nodes: the resources of this stage."
    )


class CommandStage(_Stage):
    """Any `sixfold` command; the output is the folder {here}."""

    type: Literal["command"] = Field("command", description="Run a sixfold command; the output is the folder {here}.")
    command: tuple[str, ...] = Field(min_length=1, strict=False, description="Its words, such as data, demo, digits.")
    resumable: bool = Field(False, description="Whether it goes on with what an earlier attempt left in {here}.")


StageConfig = Annotated[TrainStage | CommandStage, Field(discriminator="type")]


class PipelineConfig(Config):
    """Stages and where they are tracked."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)*$", description="Name of the pipeline."
    )
    description: str = Field("", description="One line that `sixfold recipes` shows.")
    tracking: TrackingConfig = Field(MLflowConfig(type="mlflow"), description="Where its parent run is kept.")
    all_stages: bool = Field(False, description="Run the stages that are not enabled, too.")
    left_out: tuple[Name, ...] = Field(
        (), strict=False, description="Stages that are not run: filled in with those that are null or not enabled."
    )
    stages: dict[Name, StageConfig] = Field(min_length=1, description="The stages, in the order they are run.")

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, values: Any) -> Any:
        """Take stages that are not to run out of the pipeline, and what refers to them out of commands' words."""
        if not isinstance(values, dict) or not isinstance(values.get("stages"), dict):
            return values
        stages: dict[str, Any] = values["stages"]
        out = {name for name, stage in stages.items() if _is_off(stage, every=values.get("all_stages") is True)}
        out.update(values.get("left_out") or ())
        kept = {name: _without(name, stage, out) for name, stage in stages.items() if name not in out}
        return {**values, "left_out": [name for name in stages if name in out], "stages": kept}

    @model_validator(mode="after")
    def _refer_backwards(self) -> PipelineConfig:
        before: list[str] = []
        for name, stage in self.stages.items():
            unknown = [other for other in stage.references() if other not in before]
            if unknown:
                raise ValueError(
                    f"stage {name} refers to {unknown[0]!r}, which is no stage before it; "
                    f"refer to one of: {', '.join(before) or 'none, it is the first'}"
                )
            if name == HERE:
                raise ValueError(f"no stage may be called {HERE}; rename it")
            before.append(name)
        return self


def _is_off(stage: Any, *, every: bool) -> bool:
    return stage is None or (isinstance(stage, dict) and stage.get("enabled") is False and not every)


def _without(name: str, stage: Any, out: set[str]) -> Any:
    """A stage as written, less the words of its command that refer to stages which are left out, and not after them."""
    if not isinstance(stage, dict):
        return stage
    stage = dict(stage)
    if isinstance(words := stage.get("command"), list):
        stage["command"] = [word for word in words if not out.intersection(_REFERENCE.findall(str(word)))]
    if isinstance(after := stage.get("after"), list):
        stage["after"] = [other for other in after if other not in out]
    for text in _texts(stage):
        lacking = out.intersection(_REFERENCE.findall(text))
        if lacking:
            other = min(lacking)
            raise ValueError(
                f"stage {name} reads stage {other}, which is left out; leave it out, too (stages.{name}=null), "
                f"or run {other} (stages.{other}.enabled=true)"
            )
    return stage


def fill(value: Any, folders: dict[str, str]) -> Any:
    """Put folders (or whatever stands for them) in the place of references."""
    if isinstance(value, str):
        return _REFERENCE.sub(lambda match: folders.get(match[1], match[0]), value)
    if isinstance(value, dict):
        return {key: fill(item, folders) for key, item in value.items()}
    return [fill(item, folders) for item in value] if isinstance(value, list | tuple) else value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
