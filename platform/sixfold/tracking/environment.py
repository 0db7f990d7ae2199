"""What a run was made with: code, versions, machine, command line; environment variables by allow list only."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sixfold.tracking.names import redact

PACKAGES = (
    "sixfold",
    "torch",
    "numpy",
    "accelerate",
    "deepspeed",
    "mlflow",
    "fsspec",
    "webdataset",
    "triton",
    "ray",
)
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "DS_ACCELERATOR",
    "LOCAL_WORLD_SIZE",
    "MKL_NUM_THREADS",
    "NCCL_SOCKET_IFNAME",
    "NCCL_IB_HCA",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "SLURM_JOB_ID",
    "SLURM_JOB_NODELIST",
    "SLURM_RESTART_COUNT",
    "WORLD_SIZE",
)
SNAPSHOT_RECORD = ".snapshot.json"
"""File at the root of a code snapshot, which has no git folder, that says what the code is."""

_GIT_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class GitState:
    """The state of the checkout that the code runs from.

    Attributes:
        commit: full hash of HEAD.
        dirty: whether tracked files differ from it or untracked files lie beside them.
        difference_sha256: of ``git diff HEAD`` and the untracked files' names; None when clean.
    """

    commit: str
    dirty: bool
    difference_sha256: str | None


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where and with what a run was made; ``devices`` are accelerator names, empty on a CPU."""

    git: GitState | None
    python: str
    packages: dict[str, str]
    host: str
    system: str
    cpus: int
    devices: tuple[str, ...]
    command: str
    variables: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def as_tags(self) -> dict[str, str]:
        """Return flat tags for a tracker."""
        tags = {
            "environment.host": self.host,
            "environment.python": self.python,
            "environment.system": self.system,
            "environment.cpus": str(self.cpus),
            "environment.devices": ", ".join(self.devices) or "cpu",
            "environment.command": self.command,
        }
        if self.git is not None:
            tags["mlflow.source.git.commit"] = self.git.commit
            tags["git.commit"] = self.git.commit
            tags["git.dirty"] = str(self.git.dirty).lower()
            if self.git.difference_sha256 is not None:
                tags["git.difference_sha256"] = self.git.difference_sha256
        tags |= {f"version.{name}": version for name, version in self.packages.items()}
        return tags | {f"variable.{name}": value for name, value in self.variables.items()}


def collect_environment() -> Environment:
    """Describe this process's environment; takes some tens of milliseconds (two git calls)."""
    return Environment(
        git=_snapshot_state() or git_state(Path(__file__).parent) or git_state(Path.cwd()),
        python=platform.python_version(),
        packages=_versions(),
        host=socket.gethostname(),
        system=platform.platform(),
        cpus=os.cpu_count() or 1,
        devices=_devices(),
        command=redact(shlex.join(sys.argv)),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def _snapshot_state() -> GitState | None:
    """What a launcher recorded of the snapshot that this code lies in, if it lies in one."""
    path = Path(__file__).resolve().parents[3] / SNAPSHOT_RECORD
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    return GitState(**{name: record[name] for name in ("commit", "dirty", "difference_sha256")})


def git_state(folder: Path) -> GitState | None:
    """Return the state of the checkout around ``folder``; None where it is not tracked by git, or git is missing."""
    if _git(folder, "ls-files", "--error-unmatch", ".") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    difference = _git(folder, "diff", "HEAD") or b""
    untracked = _git(folder, "ls-files", "--others", "--exclude-standard", "--full-name", ":/") or b""
    dirty = bool(difference or untracked)
    digest = hashlib.sha256(difference + b"\0" + untracked).hexdigest() if dirty else None
    return GitState(commit=commit.decode().strip(), dirty=dirty, difference_sha256=digest)


def _git(folder: Path, *arguments: str) -> bytes | None:
    command = ["git", "-c", "core.fsmonitor=false", *arguments]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, timeout=_GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _devices() -> tuple[str, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
