"""Stores reached over a network by fsspec: range reads, whole-shard fetches into the node's cache, retries.

A shard that is read is soon read wholly (lanes own their shards), so the first read of one starts a background fetch
of all of it, and range reads serve until it is there. The version of an object is looked up before its first read and
again every few seconds while it is read by ranges, so that bytes of two versions never mix unnoticed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sixfold.errors import DataError, EnvironmentFault, SixfoldError
from sixfold_data.background import Fetcher
from sixfold_data.cache import ShardCache, touch
from sixfold_data.protocols import connect, version_mark
from sixfold_data.retries import RetryPolicy, ShortReadError, describe, http_statuses
from sixfold_data.store import DescriptorPool, MissingObjectError, Pin, absent, changed, describe_pin

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

FETCH_AT_ONCE_BYTES = 4 * 2**20  # below this one request for the whole costs no more than one for a range
FETCH_PART_BYTES = 16 * 2**20
FALLBACK_QUOTA_BYTES = 8 * 2**30
TOUCH_INTERVAL_S = 30.0
_NO_SUCH_METHOD = frozenset({405, 501})
FETCH_AGAIN_AFTER_S = 60.0


@dataclass(frozen=True)
class Version:
    """One version of a remote object: its size in bytes and the store's mark of it."""

    size: int
    etag: str | None

    @property
    def mark(self) -> str:
        """The part of the cache key that changes when the object does."""
        return self.etag or f"size:{self.size}"


@dataclass(eq=False)
class _ProcessState:
    """What must not be used across a fork: event loops, connections, threads."""

    pid: int
    filesystem: Any
    fetcher: Fetcher
    versions: dict[str, tuple[Version, float]] = field(default_factory=dict)
    local: dict[str, _LocalCopy] = field(default_factory=dict)
    fetch_failed_at: dict[str, float] = field(default_factory=dict)
    serves_ranges: bool = True

    def __post_init__(self) -> None:
        _alive.add(self)


# A forked child must not even let go of what it inherited: closing a connection takes it out of the event loop's epoll
# set, which the child shares with its parent, and the parent would wait for its next answer for ever.
_alive: weakref.WeakSet[_ProcessState] = weakref.WeakSet()
_inherited: list[_ProcessState] = []
os.register_at_fork(after_in_child=lambda: _inherited.extend(_alive))


@dataclass
class _LocalCopy:
    file: str
    touched_at: float


class RemoteStore:
    """Objects below an fsspec URL; see :class:`sixfold_data.store.Store` for the contract.

    Args:
        url: the root, for example ``s3://bucket/digits`` or ``https://host/digits``.
        cache: where whole shards are kept on this node; None reads by ranges only.
        retries: how transient failures are repeated.
        recheck_s: how long a looked-up version is trusted while an object is read by ranges.
    """

    def __init__(
        self,
        url: str,
        cache: ShardCache | None = None,
        *,
        retries: RetryPolicy | None = None,
        recheck_s: float = 10.0,
    ) -> None:
        self.url = url.rstrip("/")
        self._cache = cache
        self._retries = retries or RetryPolicy()
        self._recheck_s = recheck_s
        self._pins: dict[str, Pin] = {}
        self._descriptors = DescriptorPool()
        self._state: _ProcessState | None = None

    def read(self, path: str, offset: int, length: int) -> bytes:  # noqa: D102 - see Store, here and below
        if length == 0:
            return b""
        data = self._read_local(path, offset, length)
        if data is None and self._cache is not None and self._bring_near(path):
            data = self._read_local(path, offset, length)
        if data is None:
            data = self._read_range(path, offset, length)
        if len(data) != length:
            raise changed(self._where(path), expected=describe_pin(self._pins.get(path)), found="a shorter object")
        return data

    def read_file(self, path: str) -> bytes:  # noqa: D102
        return self._request(path, lambda files: bytes(files.cat_file(self._where(path))))

    def local_path(self, path: str) -> Path:  # noqa: D102
        cache = self._cache or _fallback_cache()
        file = self._fetch(path, self._version(path), cache, wait=True)
        if file is None:
            raise EnvironmentFault.of(
                f"the object ({self.size(path)} bytes) does not fit in this node's cache at {cache.directory}",
                where=self._where(path),
                fix="give the cache more room (directory and quota of data.cache)",
            )
        return file

    def write_file(self, path: str, data: bytes) -> None:  # noqa: D102
        def put(files: Any) -> None:
            with suppress(NotImplementedError):
                files.makedirs(self._where(path).rpartition("/")[0], exist_ok=True)
            files.pipe_file(self._where(path), data)  # an object store shows an upload when it is complete

        try:
            self._request(path, put)
        except (NotImplementedError, EnvironmentFault) as error:
            if isinstance(error, EnvironmentFault) and not _NO_SUCH_METHOD.intersection(http_statuses(error)):
                raise
            raise DataError.of(
                "this kind of store can only be read", where=self.url, fix="write into a local folder and copy it there"
            ) from error

    def etag(self, path: str) -> str | None:  # noqa: D102
        return self._look_up(path).etag

    def size(self, path: str) -> int:  # noqa: D102
        return self._look_up(path).size

    def exists(self, path: str) -> bool:  # noqa: D102
        try:  # not by fsspec's own exists(): over HTTP it takes a failing server for an absent object
            self._look_up(path)
        except MissingObjectError:
            return False
        return True

    def list(self, prefix: str = "") -> list[str]:  # noqa: D102
        folder = self.url if "/" not in prefix else f"{self.url}/{prefix.rpartition('/')[0]}"
        found = self._request("", lambda files: [files.unstrip_protocol(name) for name in files.find(folder)])
        root = self._files.filesystem.unstrip_protocol(self.url).rstrip("/") + "/"
        paths = (name.removeprefix(root) for name in found)
        return sorted(path for path in paths if path.startswith(prefix))

    def pin(self, path: str, pin: Pin) -> None:  # noqa: D102
        self._pins[path] = pin

    def prefetch(self, path: str) -> None:  # noqa: D102
        if self._cache is not None:
            self._files.fetcher.submit(path)

    def close(self) -> None:  # noqa: D102
        self._descriptors = DescriptorPool()
        state, self._state = self._state, None
        if state is not None and state.pid == os.getpid():
            state.fetcher.stop()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": None, "_state": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._descriptors = DescriptorPool()

    @property
    def _files(self) -> _ProcessState:
        """This process's connections, made anew after a fork."""
        if self._state is None or self._state.pid != os.getpid():
            self._state = _ProcessState(os.getpid(), connect(self.url), Fetcher(self._fetch_in_background))
        return self._state

    def _where(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url

    def _request(self, path: str, action: Callable[[Any], Result]) -> Result:
        """Run ``action(filesystem)`` with retries; say in the user's terms what cannot be mended by retrying."""
        where = self._where(path)
        try:
            return self._retries.call(lambda: action(self._files.filesystem), where=where)
        except FileNotFoundError as error:
            raise absent(where) from error
        except PermissionError as error:
            raise EnvironmentFault.of(
                f"the store refuses access ({describe(error)})", where=where, fix="check this node's credentials"
            ) from error
        except (SixfoldError, NotImplementedError):
            raise
        except Exception as error:  # client libraries share no base class
            raise EnvironmentFault.of(f"the store failed ({describe(error)})", where=where) from error

    def _look_up(self, path: str) -> Version:
        """Ask the store for the object's version and hold it against the pin."""
        info = self._request(path, lambda files: files.info(self._where(path)))
        if info.get("size") is None or info.get("type") == "directory":
            raise absent(self._where(path))
        version = Version(int(info["size"]), version_mark(info))
        pin = self._pins.get(path)
        if pin is not None and (version.size != pin.size or (pin.etag is not None and version.etag != pin.etag)):
            found = f"{version.size} bytes" + (f" with etag {version.etag}" if version.etag else "")
            raise changed(self._where(path), expected=describe_pin(pin), found=found)
        return version

    def _version(self, path: str) -> Version:
        """Return the object's version, looked up at most every ``recheck_s`` seconds.

        Raises:
            DataError: the object is not the pinned one, or has changed since it was first read.
        """
        known = self._files.versions.get(path)
        if known is not None and time.monotonic() - known[1] < self._recheck_s:
            return known[0]
        version = self._look_up(path)
        if known is not None and known[0] != version:
            raise changed(self._where(path), expected=f"version {known[0].mark}", found=f"version {version.mark}")
        self._files.versions[path] = (version, time.monotonic())
        return version

    def _read_local(self, path: str, offset: int, length: int) -> bytes | None:
        """Read from this node's copy of the object, if there is one; no request is made."""
        copy = self._files.local.get(path)
        if copy is None:
            return None
        if time.monotonic() - copy.touched_at > TOUCH_INTERVAL_S:
            touch(Path(copy.file))
            copy.touched_at = time.monotonic()
        try:
            return self._descriptors.get(copy.file).pread(offset, length)
        except FileNotFoundError:  # evicted since; fetch it again
            del self._files.local[path]
            return None

    def _bring_near(self, path: str) -> bool:
        """Return whether a local copy is there now; if not, one is on its way where that makes sense."""
        version = self._version(path)
        assert self._cache is not None
        if (file := self._cache.find(self._where(path), version.mark)) is not None:
            self._files.local[path] = _LocalCopy(str(file), time.monotonic())
            return True
        if version.size <= FETCH_AT_ONCE_BYTES or not self._files.serves_ranges:
            return self._fetch(path, version, self._cache, wait=not self._files.serves_ranges) is not None
        failed_at = self._files.fetch_failed_at.get(path)
        if version.size <= self._cache.quota_bytes and (
            failed_at is None or time.monotonic() - failed_at > FETCH_AGAIN_AFTER_S
        ):
            self._files.fetcher.submit(path)
        return False

    def _read_range(self, path: str, offset: int, length: int) -> bytes:
        version = self._version(path)
        if offset + length > version.size:
            return b""

        def get(files: Any) -> bytes:
            data = bytes(files.cat_file(self._where(path), start=offset, end=offset + length))
            if len(data) < length:
                raise ShortReadError(f"{len(data)} of {length} bytes arrived")
            if len(data) > length:
                self._files.serves_ranges = False
            return data

        data = self._request(path, get)
        if len(data) == length:
            return data
        if self._cache is not None and self._fetch(path, version, self._cache, wait=True) is not None:
            return self._read_local(path, offset, length) or b""
        raise EnvironmentFault.of(
            "the server ignores range requests, and the shard is not cached on this node",
            where=self._where(path),
            fix="serve the data with a server that supports ranges, or give the cache a quota that holds the shards",
        )

    def _fetch_in_background(self, path: str) -> None:
        assert self._cache is not None
        try:
            self._fetch(path, self._version(path), self._cache)
        except (SixfoldError, OSError) as error:  # the read that needs the bytes meets the same fault and raises it
            logger.warning("%s was not prefetched: %s", self._where(path), describe(error))
            self._files.fetch_failed_at[path] = time.monotonic()

    def _fetch(self, path: str, version: Version, cache: ShardCache, *, wait: bool = False) -> Path | None:
        """Bring the whole object into the cache; None if there is no room or (without ``wait``) others are at it."""
        url = self._where(path)
        file = cache.find(url, version.mark) or cache.fill(
            url, version.mark, version.size, lambda descriptor: self._download(path, version, descriptor), wait=wait
        )
        if file is not None:
            self._files.local[path] = _LocalCopy(str(file), time.monotonic())
        return file

    def _download(self, path: str, version: Version, descriptor: int) -> None:
        """Write the object to ``descriptor`` in parts, each retried by itself, and prove that it is the pinned one."""
        digest = hashlib.sha256()
        position = 0
        while position < version.size:
            part = self._download_part(path, position, min(FETCH_PART_BYTES, version.size - position), version.size)
            digest.update(part)
            position += os.pwrite(descriptor, part, position)
        if self._look_up(path) != version:
            raise changed(self._where(path), expected=f"version {version.mark}", found="another, while it was fetched")
        pin = self._pins.get(path)
        if pin is not None and pin.sha256 is not None and digest.hexdigest() != pin.sha256:
            raise changed(self._where(path), expected=f"sha256 {pin.sha256}", found=f"sha256 {digest.hexdigest()}")

    def _download_part(self, path: str, start: int, length: int, size: int) -> bytes:
        def get(files: Any) -> bytes:
            whole = not self._files.serves_ranges or length == size
            limits = {} if whole else {"start": start, "end": start + length}
            data = bytes(files.cat_file(self._where(path), **limits))
            if len(data) == size and length < size:  # the server ignored the range
                self._files.serves_ranges = False
            if len(data) not in (length, size):
                raise ShortReadError(f"{len(data)} of {length} bytes arrived")
            return data if len(data) == length else data[start:]

        return self._request(path, get)


def _fallback_cache() -> ShardCache:
    """Where memory-mapped index columns go when the recipe asks for no cache of shards."""
    return ShardCache(Path(tempfile.gettempdir()) / f"sixfold-cache-{os.getuid()}", FALLBACK_QUOTA_BYTES)
