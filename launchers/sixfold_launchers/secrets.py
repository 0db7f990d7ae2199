"""Secrets travel by name: a profile lists the variables, each node reads the values from files of its own."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from sixfold.errors import EnvironmentFault, Fault


def resolve(names: Sequence[str], folder: str) -> dict[str, str]:
    """Read secrets on the node that needs them.

    Args:
        names: variables to set; each has a file of its name in the folder.
        folder: the folder on this node; ``~`` is the user's home.

    Raises:
        EnvironmentFault: with one fault for each file that is missing, or that others may read.
    """
    place = Path(folder).expanduser()
    faults, values = [], {}
    for name in names:
        path = place / name
        fault = _fault_of(path)
        if fault is None:
            values[name] = path.read_text().rstrip("\n")
        else:
            faults.append(fault)
    if faults:
        raise EnvironmentFault(*faults)
    return values


def put_into_environment(names: Sequence[str], folder: str) -> None:
    """Resolve secrets into this process's environment, after its start: no scheduler or dashboard has seen them."""
    os.environ.update(resolve(names, folder))


def _fault_of(path: Path) -> Fault | None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return Fault(
            what=f"the secret {path.name} cannot be read: {error.strerror}",
            where=str(path),
            fix=f"on this node: mkdir -p {path.parent}, write the value into {path} and chmod 600 {path}",
        )
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        return Fault(what="other users may read this secret", where=str(path), fix=f"chmod 600 {path}")
    return None
