"""Reading members of shards by sample number, checked against the index."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from sixfold_data.config import DataConfig
from sixfold_data.index import SplitIndex
from sixfold_data.order import BlockPermutation, StoredOrder
from sixfold_data.packing import Piece
from sixfold_data.store import LocalStore, Pin, Store
from sixfold_data.tokenizers import STORAGE_DTYPES

CHECKED_AT_ONCE_BYTES = 4 << 20

Row = tuple[np.ndarray, ...]
"""One decoded sample: its arrays, in the order that ``fields`` expects."""


class Unreadable(Exception):
    """A sample cannot be read: where it lies and why."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(shard, key, reason)
        self.shard, self.key, self.reason = shard, key, reason


class MemberReader:
    """Reads members of a split's shards by sample number, checked against the index."""

    def __init__(self, store: Store, index: SplitIndex) -> None:
        self.store = store
        self.index = index
        self.remote = not isinstance(store, LocalStore)
        self._sound = bytearray(len(index) // 8 + 1)
        self._damaged: set[int] = set()
        for shard in index.shards:
            store.pin(shard.path, Pin(size=shard.size, etag=shard.etag, sha256=shard.sha256))

    def read(self, extensions: Sequence[str], samples: np.ndarray) -> list[bytes | Unreadable]:
        """Return one whole member of each sample, the first of the extensions that it has."""
        contents: list[bytes | Unreadable] = [b""] * len(samples)
        shards = self.index.shard_of(samples)
        wanted = np.arange(len(samples))
        for extension in extensions:
            if extension not in self.index.members:
                continue
            member = self.index.members[extension]
            here = wanted[member.length[samples[wanted]] >= 0]
            number = samples[here]
            columns = (here, shards[here], member.offset[number], member.length[number], member.crc32[number])
            for slot, shard, offset, length, crc32 in zip(*(column.tolist() for column in columns), strict=True):
                content = self.store.read(self.index.shards[shard].path, offset, length)
                contents[slot] = content
                if zlib.crc32(content) != crc32:
                    reason = f"the checksum of its .{extension} does not match the index"
                    contents[slot] = self.unreadable(int(samples[slot]), reason)
            wanted = np.setdiff1d(wanted, here, assume_unique=True)
            if not len(wanted):
                break
        for slot in wanted.tolist():
            expected = " or ".join(f".{extension}" for extension in extensions)
            contents[slot] = self.unreadable(int(samples[slot]), f"it has no member {expected}")
        return contents

    def read_tokens(self, extension: str, piece: Piece) -> np.ndarray:
        """Return a run of a document's tokens in their stored dtype.

        Raises:
            Unreadable: the document is shorter than the index says, or its bytes have changed since it was indexed.
        """
        member, width = self.index.members[extension], STORAGE_DTYPES[extension].itemsize
        document = piece.document
        if (piece.first_token + piece.tokens) * width > member.length[document]:
            raise self.unreadable(document, "it holds fewer tokens than the index says")
        if not self._is_sound(extension, document):
            raise self.unreadable(document, f"the checksum of its .{extension} does not match the index")
        offset = int(member.offset[document]) + piece.first_token * width
        content = self.store.read(self.index.shard_path(document), offset, piece.tokens * width)
        return np.frombuffer(content, dtype=STORAGE_DTYPES[extension])

    def _is_sound(self, extension: str, document: int) -> bool:
        """Whether a document matches its checksum: it is read whole where this process first touches it.

        A checksum covers the document, of which a sequence needs a part. What has been found is kept as one bit a
        document; the few damaged ones are numbered, lest each sequence of a long one read all of it again.
        """
        byte, bit = document >> 3, 1 << (document & 7)
        if self._sound[byte] & bit:
            return True
        if document in self._damaged:
            return False
        if self._checksum(extension, document) != self.index.members[extension].crc32[document]:
            self._damaged.add(document)
            return False
        self._sound[byte] |= bit
        return True

    def _checksum(self, extension: str, sample: int) -> int:
        """Return the CRC-32 of a member as it is stored now, read in pieces so that its length costs no memory."""
        member, shard = self.index.members[extension], self.index.shard_path(sample)
        start, length = int(member.offset[sample]), int(member.length[sample])
        crc32 = 0
        for done in range(0, length, CHECKED_AT_ONCE_BYTES):
            piece = self.store.read(shard, start + done, min(CHECKED_AT_ONCE_BYTES, length - done))
            crc32 = zlib.crc32(piece, crc32)
        return crc32

    def unreadable(self, sample: int, reason: str) -> Unreadable:
        """Return the event that a sample cannot be read."""
        return Unreadable(f"{self.store.url}/{self.index.shard_path(sample)}", self.index.key(sample), reason)

    def prefetch(self, samples: np.ndarray) -> None:
        """Begin to bring the shards of some samples near."""
        for shard in np.unique(self.index.shard_of(samples)).tolist():
            self.store.prefetch(self.index.shards[shard].path)


def epoch_order(
    config: DataConfig, shard_start: np.ndarray, *, seed: int | None, lanes: int
) -> StoredOrder | BlockPermutation:
    """Return the order of samples in shards that start there: shuffled by the settings, or as stored without a seed."""
    if seed is None:
        return StoredOrder(int(shard_start[-1]))
    return BlockPermutation(
        shard_start, config.shuffle_block_shards, seed=seed, purpose="shards", blocks_held=2 * lanes + 16
    )
