"""Where checkpoints lie: a local (or shared) file system that can rename, or an object store that cannot.

Both keep one promise: a folder is *committed* in a single atomic act, and only committed folders are ever resumed from.
A file system renames ``step_N.tmp-<attempt>`` to ``step_N``; an object store keeps the folder where it was written and
puts one small marker object ``step_N.commit`` that names it. Whatever else lies there was left by an attempt that died.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

LATEST = "latest"
"""Name of the small text file that names the newest committed folder; written for people and tools, never trusted."""


@dataclass(frozen=True)
class CommittedFolder:
    """One committed checkpoint: its step and the folder, relative to the store, that holds its files."""

    step: int
    folder: str


def step_name(step: int) -> str:
    """Return the name of a step's checkpoint, padded so that names sort like steps."""
    return f"step_{step:08d}"


class Store(ABC):
    """A place for checkpoints. Paths are relative to it; all methods raise ``OSError`` where the medium fails."""

    location: str

    @abstractmethod
    def create(self) -> None:
        """Make the place itself."""

    @abstractmethod
    def temporary_name(self, step: int, attempt: str) -> str:
        """Return the folder in which ``attempt`` writes the checkpoint of ``step``."""

    @abstractmethod
    def make_folder(self, folder: str) -> None:
        """Make a folder; one that exists is fine."""

    @abstractmethod
    def writer(self, path: str) -> AbstractContextManager[BinaryIO]:
        """Open a file for writing; once the context has closed, its content survives a crash of the machine."""

    @abstractmethod
    def reader(self, path: str) -> AbstractContextManager[BinaryIO]:
        """Open a file for reading (seekable)."""

    @abstractmethod
    def sizes(self, folder: str) -> dict[str, int]:
        """Return the size in bytes of every file directly in a folder."""

    @abstractmethod
    def committed(self) -> list[CommittedFolder]:
        """Return all committed checkpoints, newest first."""

    @abstractmethod
    def leftovers(self) -> list[str]:
        """Return the folders that no commit refers to."""

    @abstractmethod
    def commit(self, temporary: str, step: int, attempt: str) -> CommittedFolder:
        """Make a completely written folder the checkpoint of ``step``, atomically.

        An earlier checkpoint of that step is superseded, but stays until retired.
        """

    @abstractmethod
    def retire(self, committed: CommittedFolder, attempt: str) -> None:
        """Delete a checkpoint, un-committing it first: a crash half-way leaves nothing that looks whole."""

    @abstractmethod
    def replace(self, name: str, content: bytes) -> None:
        """Write a small file atomically over an earlier one."""

    @abstractmethod
    def remove(self, folder: str) -> None:
        """Delete a folder that is not committed; a missing one is fine."""

    def read(self, path: str) -> bytes:
        """Return a small file's content."""
        with self.reader(path) as stream:
            return stream.read()

    def uri(self, folder: str) -> str:
        """Return where a folder lies, for people and other tools."""
        return f"{self.location}/{folder}"


def open_store(location: Path | str) -> Store:
    """Return the store at a local folder or an fsspec URL (``s3://bucket/run``, ``memory://run``)."""
    text = str(location)
    if "://" in text and not text.startswith("file://"):
        return ObjectStore(text)
    return FileStore(Path(text.removeprefix("file://")))


class FileStore(Store):
    """A file system with atomic rename and ``fsync``: local disks, NFS, Lustre, GPFS."""

    _committed = re.compile(r"step_(\d+)(\.superseded-[^-]+)?")
    _temporary = re.compile(r".+\.tmp-.+")

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.location = str(self.root)

    def create(self) -> None:
        """Make the root and its parents."""
        self.root.mkdir(parents=True, exist_ok=True)

    def temporary_name(self, step: int, attempt: str) -> str:
        """Return ``step_N.tmp-<attempt>``."""
        return f"{step_name(step)}.tmp-{attempt}"

    def make_folder(self, folder: str) -> None:
        """Make a folder under the root."""
        (self.root / folder).mkdir(exist_ok=True)

    @contextmanager
    def writer(self, path: str) -> Iterator[BinaryIO]:
        """Write, then push the data to the device and out of the page cache, so that reading back reads the device."""
        with (self.root / path).open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def reader(self, path: str) -> AbstractContextManager[BinaryIO]:
        """Open a file under the root."""
        return (self.root / path).open("rb")

    def sizes(self, folder: str) -> dict[str, int]:
        """Return sizes from one directory scan."""
        with os.scandir(self.root / folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def committed(self) -> list[CommittedFolder]:
        """Return ``step_N`` folders; a superseded one stands behind the one that took its place."""
        found: list[tuple[int, bool, str]] = []
        for name in self._names():
            match = self._committed.fullmatch(name)
            if match is not None:
                found.append((int(match[1]), match[2] is None, name))
        return [CommittedFolder(step, name) for step, _, name in sorted(found, reverse=True)]

    def leftovers(self) -> list[str]:
        """Return what dead attempts left: folders being written, and folders being deleted."""
        return [name for name in self._names() if self._temporary.fullmatch(name)]

    def commit(self, temporary: str, step: int, attempt: str) -> CommittedFolder:
        """Sync the folder's entries, rename it, and sync the rename."""
        _sync_folder(self.root / temporary)
        final = self.root / step_name(step)
        if final.exists():
            # A rename cannot replace a folder with files in it. Set aside under a name that is still resumable,
            # the earlier one bridges the instant between the two renames.
            final.rename(self.root / f"{step_name(step)}.superseded-{attempt}")
        (self.root / temporary).rename(final)
        _sync_folder(self.root)
        return CommittedFolder(step, final.name)

    def retire(self, committed: CommittedFolder, attempt: str) -> None:
        """Rename to a temporary name, then delete."""
        doomed = f"{committed.folder}.tmp-{attempt}"
        (self.root / committed.folder).rename(self.root / doomed)
        self.remove(doomed)

    def replace(self, name: str, content: bytes) -> None:
        """Write beside, sync, rename over."""
        with self.writer(f".{name}.new") as stream:
            stream.write(content)
        (self.root / f".{name}.new").replace(self.root / name)
        _sync_folder(self.root)

    def remove(self, folder: str) -> None:
        """Delete a folder tree."""
        if (self.root / folder).exists():
            shutil.rmtree(self.root / folder)

    def _names(self) -> list[str]:
        if not self.root.is_dir():
            return []
        with os.scandir(self.root) as entries:
            return [entry.name for entry in entries if entry.is_dir()]


def _sync_folder(folder: Path) -> None:
    """Make a folder's entries durable, on file systems that have a notion of it (some network ones do not)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


class ObjectStore(Store):
    """A store with atomic puts but no rename (S3, GCS, Azure), through fsspec."""

    _marker = re.compile(r"step_(\d+)\.commit")
    _folder = re.compile(r"step_\d+-.+")

    def __init__(self, url: str) -> None:
        self.location = url.rstrip("/")
        self._files, self._root = fsspec.core.url_to_fs(self.location)

    def create(self) -> None:
        """Make the root where the store has such a thing."""
        self._files.makedirs(self._root, exist_ok=True)

    def temporary_name(self, step: int, attempt: str) -> str:
        """Return ``step_N-<attempt>``; the folder keeps this name when it is committed."""
        return f"{step_name(step)}-{attempt}"

    def make_folder(self, folder: str) -> None:
        """Make a folder where the store has such a thing."""
        self._files.makedirs(self._path(folder), exist_ok=True)

    def writer(self, path: str) -> AbstractContextManager[BinaryIO]:
        """Open an object for writing: it exists, durably, when the context has closed."""
        return cast(AbstractContextManager[BinaryIO], self._files.open(self._path(path), "wb"))

    def reader(self, path: str) -> AbstractContextManager[BinaryIO]:
        """Open an object for ranged reads."""
        return cast(AbstractContextManager[BinaryIO], self._files.open(self._path(path), "rb"))

    def sizes(self, folder: str) -> dict[str, int]:
        """Return sizes from one listing."""
        entries = self._list(folder)
        return {_base_name(entry): int(entry["size"]) for entry in entries if entry["type"] == "file"}

    def committed(self) -> list[CommittedFolder]:
        """Return what the marker objects name."""
        found = []
        for entry in self._list(""):
            match = self._marker.fullmatch(_base_name(entry))
            if match is not None:
                folder = self.read(_base_name(entry)).decode(errors="replace").strip()
                found.append(CommittedFolder(int(match[1]), folder))
        return sorted(found, key=lambda each: each.step, reverse=True)

    def leftovers(self) -> list[str]:
        """Return folders that no marker names."""
        named = {each.folder for each in self.committed()}
        names = {_base_name(entry) for entry in self._list("") if entry["type"] == "directory"}
        return sorted(name for name in names - named if self._folder.fullmatch(name))

    def commit(self, temporary: str, step: int, attempt: str) -> CommittedFolder:
        """Put the marker: a single object put is atomic, and replaces an earlier marker of that step."""
        self.replace(f"{step_name(step)}.commit", temporary.encode())
        return CommittedFolder(step, temporary)

    def retire(self, committed: CommittedFolder, attempt: str) -> None:
        """Delete the marker, then the folder."""
        marker = f"{step_name(committed.step)}.commit"
        if self.read(marker).decode(errors="replace").strip() == committed.folder:
            self._files.rm(self._path(marker))
        self.remove(committed.folder)

    def replace(self, name: str, content: bytes) -> None:
        """Put one object."""
        self._files.pipe_file(self._path(name), content)

    def remove(self, folder: str) -> None:
        """Delete all objects of a folder."""
        self._files.invalidate_cache()
        if self._files.exists(self._path(folder)):
            self._files.rm(self._path(folder), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _list(self, folder: str) -> list[dict[str, Any]]:
        self._files.invalidate_cache()  # other ranks and earlier attempts write here too
        try:
            return cast(list[dict[str, Any]], self._files.ls(self._path(folder), detail=True))
        except FileNotFoundError:
            return []


def _base_name(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]
