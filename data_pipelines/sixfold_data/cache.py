"""The node's cache of remote shards: whole objects on local disk, shared by all processes of the node.

An entry is named after the hash of the object's URL and version mark (etag), so that two buckets with equal file
names never meet and a changed object is a different entry. Every state is a file, and every transition is atomic:

* ``<name>.part`` is being fetched. Its writer holds an exclusive ``flock`` on it, which the kernel drops when the
  writer dies; an unlocked one is rubbish. It has its final length from the start, so that it counts in the quota.
* ``<name>.shard`` is whole. It appears by rename and is removed only by eviction, least recently used first; a
  process that has it open can still read it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)


class ShardCache:
    """Whole objects on local disk within a quota.

    Args:
        directory: made if it does not exist; may be shared by any number of processes and data sets.
        quota_bytes: the most that whole and partial entries occupy together.
    """

    def __init__(self, directory: Path, quota_bytes: int) -> None:
        self.directory = directory
        self.quota_bytes = quota_bytes
        directory.mkdir(parents=True, exist_ok=True)

    def find(self, url: str, version: str) -> Path | None:
        """Return the file that holds this version of the object, and mark it as used, or None."""
        path = self._entry(url, version)
        return path if touch(path) else None

    def fill(
        self, url: str, version: str, size_bytes: int, write: Callable[[int], None], *, wait: bool = False
    ) -> Path | None:
        """Make the entry by ``write(descriptor)``, which must write all ``size_bytes``.

        Returns the finished file, or None if another process is fetching the same object (``wait`` waits for it), if
        the object does not fit beside what others are fetching, or if the disk is full. An error in ``write`` leaves
        nothing behind.
        """
        final = self._entry(url, version)
        partial = final.with_suffix(".part")
        with _exclusive(partial, create=True, wait=wait) as descriptor:
            if descriptor is None:
                return None
            try:
                if not touch(final):
                    if not self._reserve(descriptor, partial, size_bytes):
                        return None
                    write(descriptor)
                    os.fsync(descriptor)
                    partial.rename(final)
            finally:
                if _is_at(descriptor, partial):  # after the rename the name may already be another writer's
                    partial.unlink()
        return final

    def used_bytes(self) -> int:
        """Return what whole and partial entries occupy now."""
        return sum(size for _, size, _ in self._entries())

    def _entry(self, url: str, version: str) -> Path:
        name = hashlib.sha256(f"{url}\0{version}".encode()).hexdigest()
        return self.directory / f"{name[:40]}.shard"

    def _reserve(self, descriptor: int, partial: Path, size_bytes: int) -> bool:
        """Evict until ``size_bytes`` fit and claim them for ``partial``; False if they cannot fit now."""
        with _exclusive(self.directory / "quota.lock", create=True, wait=True):
            self._remove_abandoned(keep=partial)
            entries = sorted(entry for entry in self._entries() if entry[2] != partial)
            excess = sum(size for _, size, _ in entries) + size_bytes - self.quota_bytes
            for _, size, path in entries:
                if excess > 0 and path.suffix == ".shard":
                    path.unlink(missing_ok=True)
                    excess -= size
            if excess > 0:
                return False
            try:
                os.posix_fallocate(descriptor, 0, max(size_bytes, 1))
                os.truncate(descriptor, size_bytes)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                logger.warning("%s: the disk is full, so shards are read over the network", self.directory)
                return False
        return True

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """Yield (time of last use, bytes, path) of every entry; those that vanish meanwhile are passed over."""
        for path in self.directory.iterdir():
            if path.suffix in (".shard", ".part"):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    yield status.st_mtime, status.st_size, path

    def _remove_abandoned(self, keep: Path) -> None:
        """Remove partial entries whose writers died."""
        for path in self.directory.glob("*.part"):
            if path != keep:
                with _exclusive(path, create=False) as descriptor:
                    if descriptor is not None:
                        path.unlink(missing_ok=True)


def touch(path: Path) -> bool:
    """Mark a file as just used; False if it does not exist."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _exclusive(path: Path, *, create: bool, wait: bool = False) -> Iterator[int | None]:
    """Hold an exclusive lock on ``path`` and yield its descriptor, or None if it is held elsewhere or absent."""
    flags = os.O_RDWR | (os.O_CREAT if create else 0)
    while True:
        try:
            descriptor = os.open(path, flags, 0o644)
        except FileNotFoundError:
            yield None
            return
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            if _is_at(descriptor, path):
                yield descriptor
                return
            # Between open and lock the holder renamed or removed the file: this descriptor is not the path's.
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
