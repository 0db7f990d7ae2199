"""The run folder: a run's whole record, complete by itself, and where each part of it lies."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sixfold.errors import RecipeError, UserError
from sixfold.recipe.recipe import Recipe

_LOCK_WAIT_S = 5.0


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, ``runs/<recipe>/<run id>/`` unless the user names another."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        """Committed checkpoints and ``latest``."""
        return self.path / "checkpoints"

    @property
    def snapshots(self) -> Path:
        """Moving averages by step, from which others are reconstructed."""
        return self.path / "snapshots"

    @property
    def samples(self) -> Path:
        """Sample grids and texts by step."""
        return self.path / "samples"

    @property
    def features(self) -> Path:
        """Feature extractors trained for evaluation."""
        return self.path / "features"

    @property
    def quarantine(self) -> Path:
        """The log of samples that could not be read."""
        return self.path / "quarantine.jsonl"

    @property
    def environment(self) -> Path:
        """What each attempt was made with: code, versions, host."""
        return self.path / "environment.json"

    @property
    def run_id(self) -> str:
        """The run's identity, kept over restarts."""
        record: dict[str, str] = json.loads((self.path / "run.json").read_text())
        return record["run_id"]

    def record_environment(self, attempt: int, environment: Mapping[str, Any]) -> None:
        """Add what an attempt (from 1) is made with to those before it."""
        attempts: dict[str, Any] = {}
        if self.environment.exists():
            attempts = json.loads(self.environment.read_text())["attempts"]
        attempts[str(attempt)] = environment
        write_atomically(self.environment, json.dumps({"attempts": attempts}, indent=1) + "\n")

    def leave_error(self, rank: int, text: str) -> None:
        """Leave the error a rank ends with for whoever started it."""
        self._leave(self._error_of(rank), text)

    def leave_hang(self, rank: int, text: str) -> None:
        """Leave why a rank that stood still ends itself: unlike an error, another attempt may not meet it."""
        self._leave(self._hang_of(rank), text)

    def forget_failure(self, rank: int) -> None:
        """Remove what an earlier attempt of a rank left."""
        for path in (self._error_of(rank), self._hang_of(rank)):
            path.unlink(missing_ok=True)

    def failure(self, rank: int | None, exit_code: int) -> str:
        """What the first rank to fail left, or how it ended if it could leave nothing."""
        left = () if rank is None else (self._error_of(rank), self._hang_of(rank))
        for path in left:
            if path.exists():
                return path.read_text()
        how = signal.Signals(exit_code - 128).name if exit_code > 128 else f"exit code {exit_code}"
        return (
            f"rank {rank} ended by {how} and could leave no message\n"
            f"  fix: continue with the same command and --run-dir {self.path}; after SIGKILL look for lack of memory"
        )

    def _error_of(self, rank: int) -> Path:
        return self.path / "errors" / f"rank-{rank}.txt"

    def _hang_of(self, rank: int) -> Path:
        return self.path / "errors" / f"hang-of-rank-{rank}.txt"

    def _leave(self, path: Path, text: str) -> None:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, text)


@contextmanager
def held(folder: RunFolder) -> Iterator[int]:
    """Hold the run folder for one job: two at once would overwrite one another's records.

    Yields a descriptor that the ranks inherit, so that the folder is free only when the last of them has ended. The
    ranks of a job whose launcher was killed end within a second: that long a new job waits.

    Raises:
        UserError: another job holds the folder.
    """
    descriptor = os.open(folder.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while not _locked(descriptor):
            if time.monotonic() > deadline:
                raise UserError.of(
                    "another job is working on this run", where=str(folder.path), fix="wait for it, or stop it first"
                )
            time.sleep(0.1)
        yield descriptor
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def new_run_id() -> str:
    """Return a run id that sorts by time: ``20260131-235959-1a2b``."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def prepare_run_folder(recipe: Recipe, directory: Path | None, *, resume: bool, run_id: str | None = None) -> RunFolder:
    """Make a new run folder, or check that an existing one can be taken up; a new run gets ``run_id`` or a fresh id.

    Raises:
        UserError: the folder holds a run and ``resume`` is off, or it holds something that is not a run.
        RecipeError: the folder holds a run of another recipe name.
    """
    run_id = run_id or new_run_id()
    folder = RunFolder(directory if directory is not None else Path("runs") / recipe.name / run_id)
    if (folder.path / "run.json").exists():
        _check_same_run(folder, recipe, resume=resume)
    elif folder.path.exists() and (not folder.path.is_dir() or any(folder.path.iterdir())):
        raise UserError.of(
            "this is not an empty folder, and it holds no run",
            where=str(folder.path),
            fix="name another folder with --run-dir, or leave --run-dir out",
        )
    else:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_atomically(folder.path / "run.json", json.dumps({"run_id": run_id, "recipe": recipe.name}) + "\n")
    return folder


def take_up(folder: RunFolder, recipe: Recipe) -> None:
    """Give a held run folder the recipe as it is now, and forget how the last attempt failed."""
    write_atomically(folder.recipe, recipe.dump_yaml())
    for stale in (folder.path / "errors").glob("*.txt"):
        stale.unlink()


def _check_same_run(folder: RunFolder, recipe: Recipe, *, resume: bool) -> None:
    if not resume:
        raise UserError.of(
            "the run folder already holds a run, and --resume never was given",
            where=str(folder.path),
            fix="leave --resume out to continue that run, or name another folder with --run-dir",
        )
    name = json.loads((folder.path / "run.json").read_text())["recipe"]
    if name != recipe.name:
        raise RecipeError.of(
            f"the run folder holds a run of {name!r}, this recipe is {recipe.name!r}",
            where=str(folder.path),
            fix=f"run {name}, or name another folder with --run-dir",
        )


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader, or a crash, sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # a full disk is reported without one
        raise
