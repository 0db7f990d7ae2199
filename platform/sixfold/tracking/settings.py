"""What a mirror keeps in the run folder (``mlflow/settings.json`` and ``cursor.json``): a replay needs no recipe."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = "mlflow"


@dataclass(frozen=True, kw_only=True)
class MirrorSettings:
    """What a mirror needs besides the event log.

    Attributes:
        uri: tracking URI; sqlite paths are absolute.
        parameters: the resolved recipe, flat.
        recipe: file with the resolved recipe, absolute.
        mirror: a number drawn once for each (run folder, store, experiment), by which the run is found over there when
            the process died between making it and keeping its id.
    """

    uri: str
    experiment: str
    run_id: str
    run_name: str
    recipe_name: str
    recipe: str | None
    parameters: dict[str, str]
    tags: dict[str, str]
    mirror: str

    @classmethod
    def read(cls, run_dir: Path) -> MirrorSettings | None:
        """Return the settings kept in a run folder, if any."""
        content = _read_json(run_dir / FOLDER / "settings.json")
        return None if content is None else cls(**content)

    def write(self, run_dir: Path) -> None:
        """Keep the settings in the run folder; readable by its owner only, for a URI may hold credentials."""
        _write_json(run_dir / FOLDER / "settings.json", asdict(self))


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """How far a mirror has come: which run it made, and the last event it has sent."""

    mirror: str
    experiment_id: str | None = None
    run_id: str | None = None
    sequence: int = 0

    @classmethod
    def read(cls, run_dir: Path, mirror: str) -> Cursor:
        """Return the cursor of ``mirror``; one at the start of the log where none was kept."""
        content = _read_json(run_dir / FOLDER / "cursor.json")
        return cls(**content) if content is not None and content["mirror"] == mirror else cls(mirror=mirror)

    def write(self, run_dir: Path) -> None:
        """Keep the cursor, atomically."""
        _write_json(run_dir / FOLDER / "cursor.json", asdict(self))


def absolute_uri(uri: str) -> str:
    """Make the path of a sqlite URI absolute, so that a resume from another folder finds the same store."""
    path = sqlite_path(uri)
    return uri if path is None else f"sqlite:///{path}"


def sqlite_path(uri: str) -> Path | None:
    """Return the database file of a sqlite URI, absolute; None for other stores."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    assert isinstance(content, dict), path
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replacement = path.with_suffix(f".{os.getpid()}.tmp")
    descriptor = os.open(replacement, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(content, file, indent=1)
    replacement.replace(path)
