"""Profiles: where a job runs, as small strict records beside the recipes they leave untouched.

Files that hold them are found and read by :mod:`sixfold_launchers.profile_files`.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from sixfold.config.base import Component, Config

VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
SECRET_WORDS = re.compile(r"(?i)(token|secret|password|passwd|api_?key|access_?key|credential)")
"""What the name of a variable that holds a secret contains."""

_TIME_LIMIT = r"^([0-9]+|([0-9]+-)?[0-9]{1,2}:[0-9]{2}(:[0-9]{2})?)$"


class SnapshotConfig(Config):
    """Which code the job runs."""

    policy: Literal["tracked", "changes", "installed"] = Field(
        default="tracked",
        description="tracked: HEAD's tree. changes: with uncommitted changes of tracked files. installed: no copy.",
    )


class ContainerConfig(Config):
    """The container that every rank runs in."""

    runtime: Literal["apptainer", "pyxis"] = Field(description="apptainer exec on the node, or srun's pyxis plugin.")
    image: str = Field(min_length=1, description="Image file or reference, as the runtime understands it.")
    mounts: tuple[str, ...] = Field(default=(), description="Host folders to bind, as SOURCE:TARGET.")


class BaseProfile(Component):
    """What every kind of profile says."""

    description: str = Field(default="", description="One line that `sixfold jobs profiles` shows.")
    runs: str = Field(default="runs", min_length=1, description="Folder for runs; every node must see it.")
    python: str | None = Field(default=None, description="Interpreter on the nodes; null: this command's own.")
    environment: dict[VariableName, str] = Field(
        default_factory=dict, description="Variables of every rank; visible to anyone who may see the job."
    )
    secrets: tuple[VariableName, ...] = Field(
        default=(), description="Names of secret variables; each value is read on the node, never shipped."
    )
    secrets_folder: str = Field(
        default="~/.config/sixfold/secrets",
        min_length=1,
        description="Folder on the nodes with one file a secret, named like it, readable by its owner only.",
    )
    snapshot: SnapshotConfig = Field(default_factory=SnapshotConfig, description="Which code the job runs.")

    @field_validator("environment")
    @classmethod
    def _holds_no_secret(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if SECRET_WORDS.search(name):
                raise ValueError(
                    f"environment.{name} looks like a secret, and everyone who may see the job sees it; "
                    f"list the name under secrets: [{name}] and put its value into a file of that name on the nodes"
                )
        return environment

    def ranks_allowed(self) -> tuple[int, ...]:
        """Every number of ranks that the job may train on; one, unless the profile is elastic."""
        raise NotImplementedError


class LocalProfile(BaseProfile):
    """Processes of this machine, detached from the terminal."""

    implementation: ClassVar[str] = "sixfold_launchers.local_jobs:LocalLauncher"

    type: Literal["local"] = Field(description="Processes of this machine.")
    ranks: int = Field(default=1, ge=1, description="Ranks to start.")
    max_restarts: int = Field(default=3, ge=0, description="Fresh starts of all ranks after one was killed.")

    def ranks_allowed(self) -> tuple[int, ...]:
        """The one number of ranks."""
        return (self.ranks,)


class ElasticRanks(Config):
    """How many ranks a Ray job may train on; the number follows the cluster within the range."""

    minimum: int = Field(ge=1, description="Fewest ranks to train on.")
    maximum: int = Field(ge=1, description="Most ranks to train on.")

    @model_validator(mode="after")
    def _is_a_range(self) -> ElasticRanks:
        if self.minimum > self.maximum:
            raise ValueError(f"minimum is {self.minimum} and maximum {self.maximum}; swap them or make them equal")
        return self

    def numbers(self) -> tuple[int, ...]:
        """Every number in the range."""
        return tuple(range(self.minimum, self.maximum + 1))


class RayRanks(Config):
    """What Ray needs to know of the ranks, on a standing cluster and inside Slurm."""

    ranks: ElasticRanks = Field(
        default_factory=lambda: ElasticRanks(minimum=1, maximum=1), description="Range of the number of ranks."
    )
    cpus_per_rank: int = Field(default=1, ge=1, description="CPUs that Ray reserves for a rank.")
    gpus_per_rank: int = Field(default=0, ge=0, description="GPUs that Ray reserves for a rank.")
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        default="PACK", description="How ranks are placed over the nodes."
    )
    max_failures: int = Field(default=3, ge=-1, description="Restarts after a rank or node died; -1: without limit.")
    grow_interval_s: float = Field(
        default=60.0, gt=0.0, description="Seconds between looks for room for more ranks, within the range."
    )


class RayProfile(RayRanks, BaseProfile):
    """A standing Ray cluster, reached through its job server."""

    implementation: ClassVar[str] = "sixfold_launchers.ray_jobs:RayLauncher"

    type: Literal["ray"] = Field(description="A standing Ray cluster.")
    address: str | None = Field(
        default=None,
        pattern=r"^https?://[^/]+$",
        description="Its dashboard, such as http://head:8265; null: the cluster that `sixfold ray up` started here.",
    )
    token_file: str | None = Field(
        default=None, description="File here with the cluster's token; null: $RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token."
    )

    def ranks_allowed(self) -> tuple[int, ...]:
        """Every number in the elastic range."""
        return self.ranks.numbers()


class SlurmAllocation(Config):
    """What a Slurm allocation asks for."""

    nodes: int = Field(default=1, ge=1, description="Nodes.")
    gpus_per_node: int = Field(default=0, ge=0, description="GPUs on each node.")
    memory_per_node: str | None = Field(
        default=None, pattern=r"^[0-9]+[KMGT]?$", description="Memory of each node, such as 64G; null: the default."
    )
    partition: str | None = Field(default=None, description="Partition; null: the cluster's default.")
    account: str | None = Field(default=None, description="Account to charge; null: the user's default.")
    qos: str | None = Field(default=None, description="Quality of service; null: the default.")
    time_limit: str | None = Field(
        default=None, pattern=_TIME_LIMIT, description="Minutes, HH:MM:SS or D-HH:MM:SS; null: the partition's."
    )
    save_before_limit_s: int = Field(
        default=120,
        ge=1,
        le=3600,
        description="Seconds before the time limit at which ranks save and the job is requeued.",
    )
    requeue: bool = Field(
        default=True, description="Requeue after preemption, the time limit and node failure, without limit."
    )
    container: ContainerConfig | None = Field(default=None, description="Container of the ranks; null: none.")
    setup: tuple[str, ...] = Field(
        default=(), description="Shell lines before the ranks start, such as `module load cuda`."
    )
    sbatch: dict[str, str | int | bool] = Field(
        default_factory=dict,
        description="Further sbatch options by long name without dashes; true for a flag.",
    )

    @field_validator("time_limit", mode="before")
    @classmethod
    def _takes_minutes(cls, limit: Any) -> Any:
        """A number in YAML is minutes, as in sbatch."""
        return str(limit) if isinstance(limit, int) and not isinstance(limit, bool) else limit

    @model_validator(mode="after")
    def _saves_in_time(self) -> Self:
        limit_s = None if self.time_limit is None else _seconds_of(self.time_limit)
        if limit_s is not None and self.save_before_limit_s >= limit_s:
            raise ValueError(
                f"save_before_limit_s={self.save_before_limit_s} leaves nothing of time_limit={self.time_limit}, which "
                f"is {limit_s} s: the job would save and be requeued without a step; set a smaller one, or more time"
            )
        return self

    @field_validator("sbatch")
    @classmethod
    def _adds_options(cls, options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        for name in options:
            if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
                raise ValueError(f"sbatch.{name} is no long option of sbatch; write it without dashes, as in hint")
            if name in _OWN_OPTIONS:
                raise ValueError(f"sbatch.{name} is set by {_OWN_OPTIONS[name]}; remove it here")
        return options


_OWN_OPTIONS = {
    "nodes": "nodes",
    "gpus-per-node": "gpus_per_node",
    "mem": "memory_per_node",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "time": "time_limit",
    "signal": "save_before_limit_s",
    "requeue": "requeue",
    "no-requeue": "requeue",
    "ntasks-per-node": "ranks_per_node",
    "cpus-per-task": "cpus_per_rank",
    "ntasks": "nodes and ranks_per_node",
    **dict.fromkeys(
        ("job-name", "comment", "output", "error", "open-mode", "export", "array", "chdir"), "the launcher"
    ),
}


def _seconds_of(limit: str) -> int:
    """Read a time limit as sbatch does: minutes, M:S, H:M:S, D-H:M or D-H:M:S."""
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        parts = [*parts, 0][:3]
    elif len(parts) < 3:
        parts = [0, *parts, 0][:3]
    hours, minutes, seconds = parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


class SlurmProfile(SlurmAllocation, BaseProfile):
    """A Slurm cluster; srun starts the ranks."""

    implementation: ClassVar[str] = "sixfold_launchers.slurm:SlurmLauncher"

    type: Literal["slurm"] = Field(description="A Slurm cluster; srun starts the ranks.")
    ranks_per_node: int | None = Field(default=None, ge=1, description="Ranks on each node; null: one a GPU, else 1.")
    cpus_per_rank: int = Field(default=1, ge=1, description="CPU cores of each rank.")
    max_restarts: int = Field(
        default=3, ge=0, description="Fresh starts of all ranks inside an allocation after one was killed."
    )
    array_parallelism: int | None = Field(
        default=None, ge=1, description="Most runs of a sweep at a time; null: as many as fit."
    )

    def tasks_per_node(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    def ranks_allowed(self) -> tuple[int, ...]:
        """The one number of ranks."""
        return (self.nodes * self.tasks_per_node(),)


class SlurmRayProfile(RayRanks, SlurmAllocation, BaseProfile):
    """Ray started inside a Slurm allocation, for the job alone."""

    implementation: ClassVar[str] = "sixfold_launchers.ray_slurm:SlurmRayLauncher"

    type: Literal["slurm_ray"] = Field(description="Ray started inside a Slurm allocation.")
    cpus_per_node: int = Field(default=1, ge=1, description="CPU cores of each node that Ray may hand out.")

    def ranks_allowed(self) -> tuple[int, ...]:
        """Every number in the elastic range."""
        return self.ranks.numbers()


Profile = LocalProfile | RayProfile | SlurmProfile | SlurmRayProfile
"""Every kind of profile; a new one is added here and in :data:`KINDS`."""

KINDS: dict[str, type[Profile]] = {
    "local": LocalProfile,
    "ray": RayProfile,
    "slurm": SlurmProfile,
    "slurm_ray": SlurmRayProfile,
}


def profile_of(settings: dict[str, Any]) -> Profile:
    """Rebuild a profile from its dump (``profile.model_dump(mode="json")``)."""
    return KINDS[settings["type"]].model_validate_json(json.dumps(settings))
