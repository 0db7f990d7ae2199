"""Writing WebDataset shards: plain tars whose bytes depend on the samples alone, indexed while they are written."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from sixfold_data.index import MemberPlace, SplitEntry, SplitIndexWriter
from sixfold_data.store import write_atomically

DEFAULT_SHARD_BYTES = 256 * 2**20


class SplitWriter:
    """Writes one split below ``root`` as ``<split>/shard-000000.tar`` ... with its index.

    Time, owner and mode of every member are constants, so two builds of the same samples are the same bytes. A shard is
    closed when the next sample would take it over ``shard_bytes``.
    """

    def __init__(self, root: Path, split: str, shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        self.samples = 0
        self.bytes_written = 0
        self._root = root
        self._split = split
        self._shard_bytes = shard_bytes
        self._index = SplitIndexWriter(split)
        self._shard: _Shard | None = None
        self._shards = 0
        (root / split / "index").mkdir(parents=True)

    def add(
        self,
        key: str,
        members: Mapping[str, bytes],
        *,
        label: int | None = None,
        tokens: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Append one sample; ``members`` are bytes by extension, and ``key`` has no dot after its last ``/``.

        ``size`` is the height and width of its image (in pixels) or latent (in cells).
        """
        added = sum(1024 + len(data) for data in members.values())
        if self._shard is not None and self._shard.size + added > self._shard_bytes:
            self._end_shard()
        if self._shard is None:
            self._shard = _Shard(self._root, f"{self._split}/shard-{self._shards:06d}.tar")
            self._shards += 1
        places = {
            extension: self._shard.append(f"{key}.{extension}", data) for extension, data in sorted(members.items())
        }
        self._index.add_sample(key, places, label=label, tokens=tokens, size=size)
        self.samples += 1
        self.bytes_written += sum(map(len, members.values()))

    def finish(self) -> SplitEntry:
        """Close the last shard, write the index columns, and return the split's part of the manifest."""
        self._end_shard()
        entry, files = self._index.finish()
        for path, content in files:
            write_atomically(self._root / path, content)
        return entry

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard is not None:
            self._shard.abandon()

    def _end_shard(self) -> None:
        if self._shard is not None:
            size, sha256 = self._shard.end()
            self._index.end_shard(self._shard.path, size=size, sha256=sha256)
            self._shard = None


class _Shard:
    """One tar being written; knows where each member's data begins, and its own hash."""

    def __init__(self, root: Path, path: str) -> None:
        self.path = path
        self._file = _HashingFile((root / path).open("xb"))
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # type: ignore[call-overload]  # writing needs write() and tell() only  # noqa: SIM115 - closed by end()

    @property
    def size(self) -> int:
        return self._file.position

    def append(self, name: str, data: bytes) -> MemberPlace:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        member.mode = 0o644
        self._tar.addfile(member, io.BytesIO(data))
        padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return MemberPlace(self._file.position - padded, len(data), zlib.crc32(data))

    def end(self) -> tuple[int, str]:
        """Return (size in bytes, sha256) of the finished file."""
        self._tar.close()
        self._file.close()
        return self._file.position, self._file.sha256.hexdigest()

    def abandon(self) -> None:
        self._file.close()


class _HashingFile:
    """The little of a file that tarfile needs for writing; hashes what passes through."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.position = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.position += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.position

    def close(self) -> None:
        self._file.close()
