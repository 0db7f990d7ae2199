"""What a Ray job works through: an order in a file that every node sees, and requests to the ranks of a run.

Nothing here needs Ray: the launcher writes the order, the driver and every rank on the cluster read it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sixfold.errors import EnvironmentFault, RecipeError
from sixfold_launchers.contract import REQUEST, JobSpec
from sixfold_launchers.profiles import RayProfile, SlurmRayProfile, profile_of

ORDER = "ray.json"
DRIVER_MODULE = "sixfold_launchers.ray_driver"

Request = Literal["stop", "regroup"]
"""``stop``: save and end, a user cancels. ``regroup``: save and end, to go on with another number of ranks."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """A job as the cluster sees it.

    Attributes:
        folder: the job's folder.
        runs: run folders, trained one after the other.
        directory: where relative paths of recipes start; every node sees it.
        profile: ranks, failures, variables and names of secrets.
    """

    folder: Path
    runs: tuple[Path, ...]
    directory: Path
    profile: RayProfile | SlurmRayProfile

    def dump(self) -> str:
        """The order's file."""
        plain = {
            "folder": str(self.folder),
            "runs": [str(run) for run in self.runs],
            "directory": str(self.directory),
            "profile": self.profile.model_dump(mode="json"),
        }
        return json.dumps(plain, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> Order:
        """Read an order on a node.

        Raises:
            EnvironmentFault: this node does not see the file.
        """
        try:
            plain = json.loads(path.read_text())
        except OSError as error:
            raise EnvironmentFault.of(
                f"the job's folder cannot be read on this node: {error.strerror}",
                where=str(path),
                fix="set the profile's `runs` to a folder that every node mounts at the same place",
            ) from error
        profile = profile_of(plain["profile"])
        assert isinstance(profile, RayProfile | SlurmRayProfile)
        return cls(
            folder=Path(plain["folder"]),
            runs=tuple(Path(run) for run in plain["runs"]),
            directory=Path(plain["directory"]),
            profile=profile,
        )


@dataclass(frozen=True)
class Requests:
    """A request to all ranks of a run as a small file in its folder; they look at it between steps."""

    run: Path

    @property
    def _path(self) -> Path:
        return self.run / REQUEST

    def make(self, request: Request) -> None:
        """Ask; a user's ``stop`` is never overwritten by a ``regroup``."""
        if request == "regroup" and self.read() == "stop":
            return
        temporary = self._path.with_name(f".request.{os.getpid()}")
        temporary.write_text(request)
        temporary.replace(self._path)

    def read(self) -> Request | None:
        """What is asked now."""
        try:
            text = self._path.read_text()
        except FileNotFoundError:
            return None
        return "stop" if text == "stop" else "regroup"

    def clear(self, request: Request) -> None:
        """Take a request back once it was followed."""
        if self.read() == request:
            self._path.unlink(missing_ok=True)


def order_of(spec: JobSpec, profile: RayProfile | SlurmRayProfile) -> Order:
    """The order for a job."""
    return Order(
        folder=spec.folder,
        runs=tuple(run.folder for run in spec.runs),
        directory=spec.directory,
        profile=profile,
    )


def rank_numbers(profile: RayProfile | SlurmRayProfile, lanes: int) -> tuple[int, ...]:
    """Numbers of ranks in the profile's range among which the lanes can be shared evenly, ascending.

    Raises:
        RecipeError: there are none.
    """
    numbers = tuple(number for number in profile.ranks_allowed() if lanes % number == 0)
    if not numbers:
        allowed = [number for number in range(1, lanes + 1) if lanes % number == 0]
        raise RecipeError.of(
            f"no number of ranks from {profile.ranks.minimum} to {profile.ranks.maximum} divides {lanes} lanes",
            where="data.lanes",
            allowed=f"ranks that divide the lanes: {allowed}",
            fix="widen the profile's `ranks`, or set data.lanes to a multiple (this changes the order of samples)",
        )
    return numbers


def choose_ranks(numbers: tuple[int, ...], room: int) -> int:
    """The largest of ``numbers`` that fits into ``room``; the smallest if none does: an autoscaler then hears of it."""
    return max((number for number in numbers if number <= room), default=numbers[0])
