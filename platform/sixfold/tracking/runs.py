"""Finds run folders: by path, by run id, or by recipe and run id."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from sixfold.errors import UserError
from sixfold.tracking.events import EVENTS

RUNS = Path("runs")
_SHOWN = 5


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run's event log."""
    return (folder / EVENTS).is_file()


def list_runs(root: Path = RUNS) -> list[Path]:
    """Return all run folders below ``root``, the one written to last first."""
    return sorted(_walk(root), key=lambda run: (run / EVENTS).stat().st_mtime, reverse=True)


def find_run(reference: str, root: Path = RUNS) -> Path:
    """Return the folder of a run named by its path, its run id, or ``<recipe>/<run id>`` below ``root``.

    Raises:
        UserError: nothing or more than one run answers to the name; the nearest run ids are listed.
    """
    for folder in (Path(reference), root / reference):
        if is_run(folder):
            return folder
    runs = list_runs(root)
    found = [run for run in runs if run.name == reference]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError.of(
            f"{len(found)} runs are called {reference!r}",
            allowed=", ".join(str(run) for run in found[:_SHOWN]),
            fix="name the folder",
        )
    nearest = difflib.get_close_matches(reference, [run.name for run in runs], n=_SHOWN, cutoff=0.5)
    shown = [str(run) for run in runs if run.name in nearest] or [str(run) for run in runs]
    raise UserError.of(
        f"there is no run {reference!r} (no {EVENTS} in that folder, and no run id like it below {root}/)",
        allowed=", ".join(shown[:_SHOWN]) or f"none: {root.absolute()} holds no runs",
        fix="name a run folder or a run id" if runs else "start one with `sixfold run RECIPE`",
    )


def _walk(root: Path) -> Iterator[Path]:
    for folder, children, files in os.walk(root):
        if EVENTS in files:
            children.clear()  # checkpoints below may be large
            yield Path(folder)
