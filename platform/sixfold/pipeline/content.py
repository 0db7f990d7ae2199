"""What a stage left and what it reads from outside: content hashes, and whether files are still what they were.

The files of a data set and of a checkpoint come with their hashes, any other output is read once. Afterwards a file of
unchanged size and time counts as unchanged, and one that was touched is read again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from sixfold.checkpoint.manifest import MANIFEST, decode, hash_stream
from sixfold.config.base import Config
from sixfold.errors import DataError, SixfoldError
from sixfold.recipe.trained import RUN, locate_run
from sixfold.tracking.runs import is_run
from sixfold.train.run_folder import RunFolder
from sixfold_data.config import CacheConfig
from sixfold_data.index import MANIFEST_NAME, column_path, read_manifest
from sixfold_data.store import open_store


class FileState(Config):
    """One file when a stage had finished."""

    size_bytes: int = Field(description="Its length.")
    modified_ns: int = Field(description="When it was last written.")
    sha256: str = Field(description="Hash of its content.")


class Output(Config):
    """What a stage left."""

    kind: Literal["data", "checkpoint", "files"] = Field(description="What the hash is of.")
    sha256: str = Field(
        description="Fingerprint of a data set; hash of a checkpoint's manifest; else of all files' names and hashes."
    )
    files: dict[str, FileState] = Field(description="The files that it is made of, below the stage's folder.")


def read_output(folder: Path) -> Output:
    """Describe what a finished stage left in its folder.

    Raises:
        DataError: it left nothing.
    """
    if (folder / MANIFEST_NAME).is_file():
        fingerprint, hashes = _data_set(folder)
        return Output(kind="data", sha256=fingerprint, files=_states(folder, hashes))
    if is_run(folder) and (checkpoint := newest_checkpoint(folder)) is not None:
        files = _states(folder, _checkpoint(folder, checkpoint))
        return Output(kind="checkpoint", sha256=file_sha256(checkpoint / MANIFEST), files=files)
    hashes = {name: file_sha256(folder / name) for name in _files(folder)}
    if not hashes:
        raise DataError.of("the stage ended well and left nothing", where=str(folder), fix="let it write to {here}")
    return Output(kind="files", sha256=_combined(hashes), files=_states(folder, hashes))


def changed_files(folder: Path, output: Output) -> list[str]:
    """Return the files that are no longer what the stage left."""
    return [name for name, known in output.files.items() if _differs(folder / name, known)]


def newest_checkpoint(run: Path) -> Path | None:
    """Return the newest committed checkpoint of a run, not verified."""
    steps = {int(file.parent.name.removeprefix("step_")): file.parent for file in _manifests(run)}
    return steps[max(steps)] if steps else None


def outside(path: str) -> str | None:
    """Return a hash of what lies under a path or URL that no stage made; None where nothing can be told of it.

    Of data sets and runs it is what :func:`read_output` tells, of other folders it goes by names, sizes and times.
    """
    try:
        place = locate_run(path) if path.startswith(RUN) else Path(path).expanduser()
        if ("://" in path and not path.startswith(RUN)) or (place / MANIFEST_NAME).is_file():
            return read_manifest(open_store(path, CacheConfig())).fingerprint
        if place.is_file():
            return file_sha256(place)
        if place.is_dir():
            known = newest_checkpoint(place) if is_run(place) else None
            return file_sha256(known / MANIFEST) if known is not None else _combined(_listing(place))
    except (SixfoldError, OSError, ValueError):
        return None  # whoever reads it will say what is wrong
    return None


def file_sha256(path: Path) -> str:
    """Return the hash of a file's content; one that was not touched is read once a process."""
    at = path.stat()
    return _hashed(path, at.st_size, at.st_mtime_ns)


@lru_cache(maxsize=4096)
def _hashed(path: Path, size_bytes: int, modified_ns: int) -> str:
    with path.open("rb") as stream:
        return hash_stream(stream).sha256


def _data_set(folder: Path) -> tuple[str, dict[str, str]]:
    manifest = read_manifest(open_store(str(folder), CacheConfig()))
    hashes = {MANIFEST_NAME: file_sha256(folder / MANIFEST_NAME)}
    for split, entry in manifest.splits.items():
        hashes |= {shard.path: shard.sha256 for shard in entry.shards}
        hashes |= {column_path(split, name): column.sha256 for name, column in entry.columns.items()}
    return manifest.fingerprint, hashes


def _checkpoint(run: Path, checkpoint: Path) -> dict[str, str]:
    manifest = decode((checkpoint / MANIFEST).read_bytes())
    below = checkpoint.relative_to(run).as_posix()
    hashes = {f"{below}/{name}": record.sha256 for name, record in manifest.files.items()}
    own = {f"{below}/{MANIFEST}": checkpoint / MANIFEST, "recipe.yaml": RunFolder(run).recipe}
    return hashes | {name: file_sha256(path) for name, path in own.items()}


def _manifests(run: Path) -> list[Path]:
    found = RunFolder(run).checkpoints.glob(f"step_*/{MANIFEST}")
    return [file for file in found if file.parent.name.removeprefix("step_").isdecimal()]


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _listing(folder: Path) -> dict[str, str]:
    stats = {name: (folder / name).stat() for name in _files(folder)}
    return {name: f"{at.st_size} {at.st_mtime_ns}" for name, at in stats.items()}


def _combined(parts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()


def _states(folder: Path, hashes: Mapping[str, str]) -> dict[str, FileState]:
    stats = {name: (folder / name).stat() for name in hashes}
    return {
        name: FileState(size_bytes=at.st_size, modified_ns=at.st_mtime_ns, sha256=hashes[name])
        for name, at in stats.items()
    }


def _differs(path: Path, known: FileState) -> bool:
    try:
        at = path.stat()
        if (at.st_size, at.st_mtime_ns) == (known.size_bytes, known.modified_ns):
            return False
        return at.st_size != known.size_bytes or file_sha256(path) != known.sha256
    except OSError:
        return True
