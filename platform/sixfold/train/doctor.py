"""Examination of the machine: each finding names what is there or missing, what it is for, and the fix.

Nothing is imported that has not been found first: the examination must work where everything else does not.
"""

from __future__ import annotations

import operator
import os
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

_LITTLE_MEMORY_BYTES = 4 << 30
_LITTLE_DISK_BYTES = 5 << 30
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow"}
"""What a package is installed as, where that is not its name."""
_NEEDED_PACKAGES = ("torch", "numpy", "fsspec", "webdataset", "safetensors", "PIL", "psutil")
_OPTIONAL_PACKAGES = {
    "accelerate": ("engine type ddp on several devices", "accelerate"),
    "deepspeed": ("engine type deepspeed", "deepspeed"),
    "mlflow": ("tracking type mlflow and `sixfold ui`", "mlflow"),
    "ray": ("profiles of kind ray", "ray"),
    "submitit": ("reading a Slurm cluster's accounts", "slurm"),
    "s3fs": ("data on S3", "remote"),
    "aiohttp": ("data over HTTP", "remote"),
    "sklearn": ("the digits demo data", "demo"),
}
"""Package to what it is for and the extra that installs it."""
_PROGRAMS = {
    "C++ compiler": (
        ("c++", "g++", "clang++"),
        "engine.compile and ZeRO's optimizer offload",
        "install g++ or clang",
    ),
    **{
        program: ((program,), "profiles of kind slurm", "submit from a login node, or install Slurm's client programs")
        for program in ("sbatch", "squeue", "scancel", "sinfo")
    },
    "browser": (
        ("chromium", "chromium-browser", "google-chrome", "firefox"),
        "looking at `sixfold ui` on this machine, and the test of it",
        "apt install chromium chromium-driver, or open the printed link elsewhere",
    ),
}
"""Program to the names that do, what it is for, and how to get it."""
_COMPARISONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt, "==": operator.eq}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fact about the machine: ``ok``, ``missing`` (some use is impossible) or ``broken`` (training is)."""

    state: Literal["ok", "missing", "broken"]
    subject: str
    detail: str
    fix: str = ""


def examine() -> list[Finding]:
    """Look at packages, devices, programs, memory, disk and loopback."""
    needed, optional = [*_needed_packages()], [*_optional_packages()]
    torch_works = all(finding.state == "ok" for finding in needed if finding.subject == "torch")
    return [*needed, *(_devices() if torch_works else ()), *optional, *_programs(), *_resources(), *_loopback()]


def _needed_packages() -> Iterator[Finding]:
    for package in _NEEDED_PACKAGES:
        name = _DISTRIBUTIONS.get(package, package)
        yield _package(package, "training", fix=f"pip install '{name}{_range_of(name)}'", otherwise="broken")


def _optional_packages() -> Iterator[Finding]:
    for package, (purpose, extra) in _OPTIONAL_PACKAGES.items():
        yield _package(package, purpose, fix=f"pip install 'sixfold[{extra}]'", otherwise="missing")


def _package(package: str, purpose: str, *, fix: str, otherwise: Literal["missing", "broken"]) -> Finding:
    """Whether a package is there, in a version that ``pyproject.toml`` allows."""
    name = _DISTRIBUTIONS.get(package, package)
    allowed = _range_of(name)
    wanted = f"{name}{allowed}" if allowed else name
    if util.find_spec(package) is None:
        return Finding(state=otherwise, subject=package, detail=f"{wanted} is needed for {purpose}", fix=fix)
    version = metadata.version(name)
    if not within(version, allowed):
        detail = f"{version} is installed, {wanted} is needed for {purpose}"
        return Finding(state=otherwise, subject=package, detail=detail, fix=fix)
    return Finding(state="ok", subject=package, detail=f"{version} ({allowed})" if allowed else version)


def _range_of(distribution: str) -> str:
    """The versions that this installation of sixfold allows, such as ``<2.14,>=2.11``; empty for any."""
    try:
        requirements = metadata.requires("sixfold") or []
    except metadata.PackageNotFoundError:  # a snapshot of the code on PYTHONPATH
        return ""
    for requirement in requirements:
        found = re.match(r"([\w.-]+)(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?", requirement)
        if found and found[1].lower() == distribution:
            return found[2].strip()
    return ""


def within(version: str, allowed: str) -> bool:
    """Whether a version is in a range such as ``<2.14,>=2.11``; numbers are compared, local labels left out."""
    for part in filter(None, allowed.split(",")):
        found = re.match(r"\s*(>=|<=|==|>|<)\s*([\d.]+)", part)
        assert found, f"{part} is no bound of a version"
        ours, bound = _numbers(version), _numbers(found[2])
        length = max(len(ours), len(bound))
        padded = [numbers + (0,) * (length - len(numbers)) for numbers in (ours, bound)]
        if not _COMPARISONS[found[1]](*padded):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    assert found, f"{version} is no version"
    return tuple(map(int, found[0].split(".")))


def _devices() -> Iterator[Finding]:
    try:
        import torch

        from sixfold.engine.precision import compute_dtype
    except (ImportError, OSError) as error:  # installed, but not for this machine
        fix = "install torch for this machine: https://pytorch.org/get-started/locally"
        yield Finding(state="broken", subject="torch", detail=f"cannot be imported: {error}", fix=fix)
        return
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


def _programs() -> Iterator[Finding]:
    for subject, (names, purpose, fix) in _PROGRAMS.items():
        path = next((path for name in names if (path := shutil.which(name))), None)
        if path is None:
            yield Finding(state="missing", subject=subject, detail=f"needed for {purpose}", fix=fix)
        else:
            yield Finding(state="ok", subject=subject, detail=path)


def _resources() -> Iterator[Finding]:
    free = {"disk": (shutil.disk_usage(Path.cwd()).free, _LITTLE_DISK_BYTES)}
    if util.find_spec("psutil") is not None:
        import psutil  # type: ignore[import-untyped]  # it ships no types

        free["memory"] = (psutil.virtual_memory().available, _LITTLE_MEMORY_BYTES)
    for subject, (available, little) in free.items():
        detail = f"{available / (1 << 30):.1f} GiB free"
        if available < little:
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
