"""Where a data set lies: one interface over a local folder and any fsspec URL.

Paths are relative to the store's root and use ``/``. A store may be pickled and survives a fork: connections,
threads and descriptors belong to the process that made them and are made anew where they are first needed.
"""

from __future__ import annotations

import os
import resource
import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sixfold.errors import DataError, EnvironmentFault, SixfoldError

if TYPE_CHECKING:
    from sixfold_data.config import CacheConfig


@dataclass(frozen=True, kw_only=True)
class Pin:
    """What an index says about an object; a read of anything else is refused."""

    size: int
    etag: str | None = None
    sha256: str | None = None


class Store(Protocol):
    """A folder of objects, local or remote. Every method raises DataError if the object is absent or has changed,
    and EnvironmentFault if the store cannot be reached or refuses access."""

    url: str

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``offset``."""
        ...

    def read_file(self, path: str) -> bytes:
        """Return a whole object, past the cache; meant for small ones."""
        ...

    def local_path(self, path: str) -> Path:
        """Return a local file with the object's bytes, for memory mapping; remote ones are fetched into the cache."""
        ...

    def write_file(self, path: str, data: bytes) -> None:
        """Write an object so that readers see all of it or nothing."""
        ...

    def etag(self, path: str) -> str | None:
        """Return the store's mark of the object's version (``modified:<time>`` where it has no etag); None locally."""
        ...

    def size(self, path: str) -> int:
        """Return the object's size in bytes."""
        ...

    def exists(self, path: str) -> bool:
        """Whether there is such an object."""
        ...

    def list(self, prefix: str = "") -> list[str]:
        """Return the paths of all objects, at any depth, that begin with ``prefix``, sorted."""
        ...

    def pin(self, path: str, pin: Pin) -> None:
        """Expect the object to be as the index says: size always, etag and sha256 where they are known."""
        ...

    def prefetch(self, path: str) -> None:
        """Begin to bring an object near, in the background. Returns at once; failures surface when it is read."""
        ...

    def close(self) -> None:
        """Release descriptors, threads and connections of this process; the store may be used again."""
        ...


def open_store(url: str, cache: CacheConfig | None = None) -> Store:
    """Return the store at a folder or any fsspec URL (``s3://``, ``gs://``, ``https://``, ``memory://`` ...).

    Credentials and endpoints of remote stores come from their own environment variables (``AWS_ENDPOINT_URL``) or
    from fsspec's configuration files, never from here. Without ``cache``, remote objects are read by ranges.
    """
    if "://" not in url or url.startswith("file://"):
        return LocalStore(url.removeprefix("file://"))
    from sixfold_data.cache import ShardCache
    from sixfold_data.remote import RemoteStore

    shards = None if cache is None else ShardCache(Path(cache.directory).expanduser(), cache.quota_bytes)
    return RemoteStore(url, shards)


class LocalStore:
    """A folder of this machine; shards are read by ``os.pread`` on descriptors that stay open."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._root = Path(folder).expanduser()
        self._prefix = f"{self._root}{os.sep}"  # joining paths would cost more than the read itself
        self.url = str(folder)
        self._pins: dict[str, Pin] = {}
        self._descriptors = DescriptorPool()

    def read(self, path: str, offset: int, length: int) -> bytes:  # noqa: D102 - see Store, here and below
        try:
            file = self._descriptors.get(self._prefix + path)
            data = file.pread(offset, length)
        except OSError as error:
            raise self._explain(path, error) from error
        pin = self._pins.get(path)
        if len(data) != length or (pin is not None and file.size != pin.size):
            raise changed(self._prefix + path, expected=describe_pin(pin), found=f"{file.size} bytes")
        return data

    def read_file(self, path: str) -> bytes:  # noqa: D102
        try:
            return (self._root / path).read_bytes()
        except OSError as error:
            raise self._explain(path, error) from error

    def local_path(self, path: str) -> Path:  # noqa: D102
        self.size(path)
        return self._root / path

    def write_file(self, path: str, data: bytes) -> None:  # noqa: D102
        target = self._root / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, data)
        except OSError as error:
            raise self._explain(path, error) from error

    def etag(self, path: str) -> str | None:  # noqa: D102
        self.size(path)
        return None

    def size(self, path: str) -> int:  # noqa: D102
        try:
            return (self._root / path).stat().st_size
        except OSError as error:
            raise self._explain(path, error) from error

    def exists(self, path: str) -> bool:  # noqa: D102
        return (self._root / path).is_file()

    def list(self, prefix: str = "") -> list[str]:  # noqa: D102
        if not self._root.is_dir():
            raise DataError.of("there is no such folder", where=str(self._root), fix="check the path of the data set")
        files = (file.relative_to(self._root).as_posix() for file in self._root.rglob("*") if file.is_file())
        return sorted(file for file in files if file.startswith(prefix))

    def pin(self, path: str, pin: Pin) -> None:  # noqa: D102
        self._pins[path] = pin

    def prefetch(self, path: str) -> None:
        """Ask the kernel to read the file ahead; an absent file is reported when it is read."""
        try:
            self._descriptors.get(self._prefix + path).read_ahead()
        except OSError:
            return

    def close(self) -> None:  # noqa: D102
        self._descriptors = DescriptorPool()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_descriptors": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._descriptors = DescriptorPool()

    def _explain(self, path: str, error: OSError) -> SixfoldError:
        where = str(self._root / path)
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            return absent(where)
        return EnvironmentFault.of(f"this machine could not use the file ({error.strerror})", where=where)


class DescriptorPool:
    """Read-only descriptors kept open, the least recently used closed first.

    ``pread`` has no shared position, so a descriptor may be used by many threads and by forked children. One that
    leaves the pool is closed when the last reader lets go of it.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit or descriptor_limit()
        self._open: OrderedDict[str, OpenFile] = OrderedDict()

    def get(self, file: str) -> OpenFile:
        """Return the file, opened now if it was not."""
        opened = self._open.pop(file, None) or OpenFile(file)
        self._open[file] = opened
        if len(self._open) > self._limit:
            self._open.popitem(last=False)
        return opened


def descriptor_limit() -> int:
    """Return how many descriptors one store may keep: a quarter of what the process may have, at most 512."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 512 if allowed == resource.RLIM_INFINITY else min(512, max(16, allowed // 4))


class OpenFile:
    """A descriptor, and the size that the file had when it was opened; closed when nobody holds it."""

    def __init__(self, file: str) -> None:
        self.number = os.open(file, os.O_RDONLY)
        self.size = os.fstat(self.number).st_size

    def pread(self, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes, fewer only at the end of the file."""
        data = os.pread(self.number, length, offset)
        while 0 < len(data) < length:  # one call returns at most 2**31 - 4096 bytes
            more = os.pread(self.number, length - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def read_ahead(self) -> None:
        """Advise the kernel that the whole file will be read."""
        os.posix_fadvise(self.number, 0, 0, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def write_atomically(target: Path, data: bytes) -> None:
    """Write beside the target and rename, so that a reader or a crash never meets half a file."""
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class MissingObjectError(DataError, FileNotFoundError):
    """An object that is not there; also a FileNotFoundError, for callers to whom that is an answer."""


def absent(where: str) -> SixfoldError:
    """Return the error for an object that is not there."""
    return MissingObjectError.of(
        "there is no such file",
        where=where,
        fix="restore it, or rebuild the index with `sixfold data index` if the data set is meant to be without it",
    )


def changed(where: str, *, expected: str, found: str) -> SixfoldError:
    """Return the error for an object that is not the one that was indexed."""
    return DataError.of(
        f"the object is not the one that was indexed: expected {expected}, found {found}",
        where=where,
        fix="restore the indexed object, or index the data set again with `sixfold data index` (a new fingerprint: "
        "runs on the old one cannot resume on it)",
    )


def describe_pin(pin: Pin | None) -> str:
    """Return what the index expects, for an error."""
    if pin is None:
        return "more bytes than there are"
    return f"{pin.size} bytes" + (f" with etag {pin.etag}" if pin.etag else "")
