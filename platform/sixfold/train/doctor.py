"""Examination of the machine: each finding names what is there or missing, what it is for, and the fix."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

import psutil  # type: ignore[import-untyped]  # it ships no types
import torch

from sixfold.engine.precision import compute_dtype

_LITTLE_MEMORY_BYTES = 4 << 30
_LITTLE_DISK_BYTES = 5 << 30
_OPTIONAL_PACKAGES = {
    "accelerate": ("engine type ddp on several devices", "accelerate"),
    "deepspeed": ("engine type deepspeed", "deepspeed"),
    "mlflow": ("tracking type mlflow and `sixfold ui`", "mlflow"),
    "s3fs": ("data on S3", "remote"),
    "aiohttp": ("data over HTTP", "remote"),
    "sklearn": ("the digits demo data", "demo"),
}
"""Package to what it is for and the extra that installs it."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fact about the machine: ``ok``, ``missing`` (some use is impossible) or ``broken`` (training is)."""

    state: Literal["ok", "missing", "broken"]
    subject: str
    detail: str
    fix: str = ""


def examine() -> list[Finding]:
    """Look at packages, devices, memory, disk and loopback."""
    return [*_torch(), *_packages(), *_compiler(), *_resources(), *_loopback()]


def _torch() -> Iterator[Finding]:
    yield Finding(state="ok", subject="torch", detail=torch.__version__)
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        yield Finding(state="ok", subject="CUDA", detail=names)
    else:
        yield Finding(
            state="ok", subject="device", detail=f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield Finding(
        state="ok", subject="precision auto", detail=str(compute_dtype("auto", device)).removeprefix("torch.")
    )


def _packages() -> Iterator[Finding]:
    for package, (purpose, extra) in _OPTIONAL_PACKAGES.items():
        if util.find_spec(package) is None:
            fix = f"pip install 'sixfold[{extra}]'"
            yield Finding(state="missing", subject=package, detail=f"needed for {purpose}", fix=fix)
        else:
            distribution = {"sklearn": "scikit-learn"}.get(package, package)
            yield Finding(state="ok", subject=package, detail=metadata.version(distribution))


def _compiler() -> Iterator[Finding]:
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        purpose = "needed for engine.compile and ZeRO's optimizer offload"
        yield Finding(state="missing", subject="C++ compiler", detail=purpose, fix="install g++ or clang")
    else:
        yield Finding(state="ok", subject="C++ compiler", detail=compiler)


def _resources() -> Iterator[Finding]:
    for subject, free, little in (
        ("memory", psutil.virtual_memory().available, _LITTLE_MEMORY_BYTES),
        ("disk", shutil.disk_usage(Path.cwd()).free, _LITTLE_DISK_BYTES),
    ):
        detail = f"{free / (1 << 30):.1f} GiB free"
        if free < little:
            fix = f"free some: recipes beyond smoke size want {little >> 30} GiB and more"
            yield Finding(state="missing", subject=subject, detail=detail, fix=fix)
        else:
            yield Finding(state="ok", subject=subject, detail=detail)


def _loopback() -> Iterator[Finding]:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError as error:
        fix = "allow this user to listen on 127.0.0.1: ranks of one machine meet there"
        yield Finding(state="broken", subject="loopback", detail=str(error), fix=fix)
    else:
        yield Finding(state="ok", subject="loopback", detail="ranks can meet on 127.0.0.1")
