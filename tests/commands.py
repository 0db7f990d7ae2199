"""The `sixfold` command as a user runs it, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from sixfold.tracking.events import read_metrics


def sixfold(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    """Start a command in a folder, on one core."""
    return subprocess.Popen(
        [sys.executable, "-m", "sixfold.cli.main", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output_of(*arguments: str, folder: Path, timeout_s: float = 200.0) -> str:
    """Run a command that must succeed, and return what it printed."""
    process = sixfold(*arguments, folder=folder)
    output, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, output
    return output


def train(recipe: str, *overrides: str, run: Path, timeout_s: float = 500.0) -> Path:
    """Train a recipe, and return its run folder."""
    words = ("run", recipe, *overrides, "tracking.type=jsonl", "--run-dir", str(run))
    output_of(*words, folder=run.parent, timeout_s=timeout_s)
    return run


def last_values(run: Path) -> dict[str, float]:
    """The last value of every metric of a run."""
    return {name: series[max(series)] for name, series in read_metrics(run).items()}


def table_of_pipeline(name: str, folder: Path) -> list[dict[str, Any]]:
    """Run a pipeline to its end, print the table that its last stage writes, and return the table's rows."""
    output_of("run", name, "--run-dir", str(folder / "pipeline"), folder=folder, timeout_s=7000)
    (written,) = (folder / "pipeline").glob("table-*/table.md")
    print(f"\n{written.read_text()}")
    rows: list[dict[str, Any]] = json.loads(written.with_suffix(".json").read_text())
    return rows
