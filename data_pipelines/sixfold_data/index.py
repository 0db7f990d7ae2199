"""The index of a data set: what lies where in its shards, held as columns that are memory-mapped, never parsed.

A data set is a folder or URL::

    dataset.json                    the manifest: kind, classes, tokenizer, shards, columns, fingerprint
    train/shard-000000.tar          plain WebDataset tars
    train/index/offset.png.npy      one array a column, one row a sample, samples in shard order

Columns (``<ext>`` is a member's extension in the tar):

=================  ========  =========  ============================================================================
name               dtype     shape      meaning
=================  ========  =========  ============================================================================
``key_bytes``      uint8     [bytes]    the samples' keys in UTF-8, back to back
``key_start``      int64     [n + 1]    where each key starts in ``key_bytes``
``offset.<ext>``   int64     [n]        byte offset of the member's *data* in its shard
``length.<ext>``   int64     [n]        its length in bytes, -1 where the sample lacks it (of ``txt``: the caption's)
``crc32.<ext>``    uint32    [n]        its CRC-32, so that a flipped byte is found when it is read
``token_start``    int64     [n + 1]    cumulative token counts of the documents (text only)
``label``          int32     [n]        class number, -1 where unknown (labelled images only)
``height``         int32     [n]        pixels of an image, cells of a latent; 0 where unknown
``width``          int32     [n]        as ``height``
=================  ========  =========  ============================================================================

A sample's shard is not stored: samples stand in shard order and the manifest counts them by shard. The *fingerprint*
is the SHA-256 of the manifest without etags, hence a function of the content alone: a copy elsewhere has the same one.
Indexes of version 1, which lack heights and widths, are read too; what needs those refuses them.
"""

from __future__ import annotations

import hashlib
import io
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, ValidationError

from sixfold.config.base import Config
from sixfold.errors import DataError

if TYPE_CHECKING:
    from sixfold_data.store import Store

FORMAT = "sixfold-data/2"
MANIFEST_NAME = "dataset.json"
DEMO_NAMES = ("digits", "stdlib", "scenes")
Kind = Literal["text", "images", "image-text", "latents"]


class ShardEntry(Config):
    """One tar of a split."""

    path: str = Field(description="Path below the data set's root.")
    samples: int = Field(ge=0, description="Number of samples.")
    size: int = Field(ge=0, description="Size in bytes.")
    sha256: str = Field(description="SHA-256 of its bytes, hexadecimal.")
    etag: str | None = Field(default=None, description="The store's etag when it was indexed; none on local disks.")


class ColumnEntry(Config):
    """One array file of a split's index."""

    dtype: str = Field(description="numpy dtype, little endian.")
    shape: tuple[int, ...] = Field(description="Shape of the array.")
    sha256: str = Field(description="SHA-256 of the .npy file, hexadecimal.")


class SplitEntry(Config):
    """One split: its shards in order and the columns of its index."""

    samples: int = Field(ge=0, description="Number of samples (documents for text).")
    tokens: int | None = Field(default=None, description="Number of tokens, end-of-text tokens included (text only).")
    shards: tuple[ShardEntry, ...] = Field(description="Shards in order.")
    columns: dict[str, ColumnEntry] = Field(description="Columns by name; each is <split>/index/<name>.npy.")


class LatentsEntry(Config):
    """What the latents of a data set are, and which codec decodes them."""

    codec: str = Field(description="SHA-256 of the codec's weights: only that codec decodes these latents.")
    source: str = Field(description="Fingerprint of the images that were encoded.")
    form: Literal["moments", "codes"] = Field(
        description="Each posterior's mean and log-variance, stacked along channels in fp16; or integer codes."
    )
    channels: int = Field(ge=1, description="Channels of a latent (1 for codes).")
    size: tuple[int, int] | None = Field(description="Height and width of a latent, when all share them.")
    codebook_size: int | None = Field(default=None, description="How many different codes there are.")
    mean: tuple[float, ...] = Field(default=(), description="Mean of each channel over the training split (moments).")
    std: tuple[float, ...] = Field(
        default=(), description="Standard deviation of each channel's posterior samples over it (moments)."
    )


class TextFeaturesEntry(Config):
    """What one frozen text encoder made of the captions; see :mod:`sixfold_data.text_features`."""

    dtype: Literal["fp32", "bf16"] = Field(description="Type of the numbers.")
    values: int = Field(ge=1, description="Numbers of one caption: its text tokens, then its pooled features.")
    null: str = Field(description="File below the data set's root with what it makes of no caption.")
    null_sha256: str = Field(description="Hash of that file.")


class Manifest(Config):
    """``dataset.json``."""

    format: Literal["sixfold-data/1", "sixfold-data/2"] = Field(description="Version of this format.")
    kind: Kind = Field(description="What a sample is.")
    classes: tuple[str, ...] = Field(default=(), description="Class names by label number.")
    tokenizer: dict[str, str] | None = Field(
        default=None, description="Tokenizer of text or captions: see sixfold_data.tokenizers."
    )
    image_size: tuple[int, int] | None = Field(
        default=None, description="Height and width in pixels, when all images share them."
    )
    channels: Literal[1, 3] | None = Field(default=None, description="1 (grey) or 3 (RGB), for images.")
    latents: LatentsEntry | None = Field(
        default=None, description="For kind latents, whose image_size and channels are those of the images encoded."
    )
    text: dict[str, TextFeaturesEntry] = Field(
        default_factory=dict, description="Features of captions, by the identity of the encoder that made them."
    )
    splits: dict[str, SplitEntry] = Field(description="Splits by name.")
    fingerprint: str = Field(default="", description="SHA-256 of everything above except etags.")

    def computed_fingerprint(self) -> str:
        """Hash the manifest's content, etags and the recorded fingerprint left out."""
        content = self.model_dump(mode="json", exclude={"fingerprint"})
        for name in ("latents", "text"):
            if not content[name]:
                del content[name]  # so that data sets without keep the fingerprints they had before there were any
        for split in content["splits"].values():
            for shard in split["shards"]:
                del shard["etag"]
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def sealed(self) -> Manifest:
        """Return the manifest with its fingerprint filled in."""
        return self.model_copy(update={"fingerprint": self.computed_fingerprint()})

    def to_bytes(self) -> bytes:
        """Serialise for ``dataset.json``."""
        return (self.model_dump_json(indent=1) + "\n").encode()


def _demo_command(url: str) -> str:
    """Name the command that makes the data set the smoke recipes train on, where it is one of those."""
    name = url.rstrip("/").rpartition("/")[2]
    return f"make this demo with `sixfold data demo {name} --out {url}`, " if name in DEMO_NAMES else ""


def read_manifest(store: Store) -> Manifest:
    """Read and check ``dataset.json``.

    Raises:
        DataError: there is none, it is malformed or of another version, or its fingerprint does not match its content.
    """
    where = f"{store.url}/{MANIFEST_NAME}"
    if not store.exists(MANIFEST_NAME):
        raise DataError.of(
            "there is no indexed data set here",
            where=where,
            fix=f"{_demo_command(store.url)}build one with `sixfold data build`, or index existing shards with "
            "`sixfold data index`",
        )
    try:
        manifest = Manifest.model_validate_json(store.read_file(MANIFEST_NAME))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError.of(
            f"the manifest is malformed: {place}: {first['msg']}",
            where=where,
            allowed=f"format {FORMAT}, or its predecessor sixfold-data/1",
            fix="write it again with `sixfold data index`",
        ) from error
    if manifest.fingerprint != manifest.computed_fingerprint():
        raise DataError.of(
            "the manifest does not match its own fingerprint: it was changed after it was written",
            where=where,
            fix="write it again with `sixfold data index`, or restore the original file",
        )
    _check_counts(manifest, where)
    return manifest


def _check_counts(manifest: Manifest, where: str) -> None:
    for name, split in manifest.splits.items():
        counted = sum(shard.samples for shard in split.shards)
        if counted != split.samples:
            raise DataError.of(
                f"split {name} claims {split.samples} samples but its shards hold {counted}",
                where=where,
                fix="write it again with `sixfold data index`",
            )


def column_path(split: str, column: str) -> str:
    """Path of a column's file below the data set's root."""
    return f"{split}/index/{column}.npy"


@dataclass(frozen=True)
class Member:
    """Where one kind of member lies: offset in the shard, length (-1 when absent) and CRC-32, each ``[n]``."""

    offset: np.ndarray
    length: np.ndarray
    crc32: np.ndarray


class SplitIndex:
    """The memory-mapped index of one split.

    Attributes:
        name: the split's name.
        entry: its part of the manifest.
        shard_start: ``[shards + 1]`` int64, the first sample of each shard.
        members: columns by extension.
        label: ``[n]`` int32 or None.
        height, width: ``[n]`` int32 or None, of images and latents; 0 where unknown.
        token_start: ``[n + 1]`` int64 cumulative token counts, or None.
    """

    def __init__(self, name: str, entry: SplitEntry, columns: Mapping[str, np.ndarray]) -> None:
        self.name = name
        self.entry = entry
        counts = np.fromiter((shard.samples for shard in entry.shards), dtype=np.int64, count=len(entry.shards))
        self.shard_start = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
        extensions = [column.removeprefix("offset.") for column in columns if column.startswith("offset.")]
        self.members = {
            extension: Member(
                columns[f"offset.{extension}"], columns[f"length.{extension}"], columns[f"crc32.{extension}"]
            )
            for extension in extensions
        }
        self.label = columns.get("label")
        self.height, self.width = columns.get("height"), columns.get("width")
        self.token_start = columns.get("token_start")
        self._key_start, self._key_bytes = columns["key_start"], columns["key_bytes"]

    def __len__(self) -> int:
        return self.entry.samples

    @property
    def shards(self) -> Sequence[ShardEntry]:
        """The shards in order."""
        return self.entry.shards

    def shard_of(self, samples: np.ndarray) -> np.ndarray:
        """Return the shard number of each sample number."""
        return np.searchsorted(self.shard_start, samples, side="right") - 1

    def shard_path(self, sample: int) -> str:
        """Return the path of the shard that holds a sample."""
        return self.shards[int(np.searchsorted(self.shard_start, sample, side="right")) - 1].path

    @property
    def caption_bytes(self) -> np.ndarray | None:
        """``[n]``, the length of each caption in bytes, -1 where a sample lacks one; None where all do."""
        return self.members["txt"].length if "txt" in self.members else None

    def key(self, sample: int) -> str:
        """Return the key of a sample in its tar."""
        return bytes(self._key_bytes[self._key_start[sample] : self._key_start[sample + 1]]).decode()


def open_split(store: Store, manifest: Manifest, split: str) -> SplitIndex:
    """Memory-map the index of one split.

    Raises:
        DataError: the split does not exist, or a column is missing or is not the one that the manifest records.
    """
    if split not in manifest.splits:
        raise DataError.of(
            f"there is no split {split!r}",
            where=store.url,
            allowed=", ".join(sorted(manifest.splits)),
            fix="name another split under data.splits, or build the data set with one",
        )
    entry = manifest.splits[split]
    columns = {name: _open_column(store, column_path(split, name), entry.columns[name]) for name in entry.columns}
    missing = sorted({"key_start", "key_bytes"} - set(columns))
    if missing:
        raise DataError.of(
            f"the index of split {split!r} lacks the columns {', '.join(missing)}",
            where=f"{store.url}/{MANIFEST_NAME}",
            fix="index the shards again with `sixfold data index`",
        )
    return SplitIndex(split, entry, columns)


def _open_column(store: Store, path: str, entry: ColumnEntry) -> np.ndarray:
    where, fix = f"{store.url}/{path}", "index the shards again with `sixfold data index`"
    file = store.local_path(path)
    try:
        # An empty file cannot be mapped.
        column = np.asarray(np.load(file, mmap_mode="r" if np.prod(entry.shape) else None, allow_pickle=False))
    except (ValueError, EOFError, OSError) as error:
        raise DataError.of(f"a column of the index cannot be read: {error}", where=where, fix=fix) from error
    if column.shape != entry.shape or column.dtype.str != entry.dtype:
        raise DataError.of(
            f"a column of the index has shape {column.shape} and dtype {column.dtype.str}",
            where=where,
            allowed=f"shape {entry.shape} and dtype {entry.dtype}, as the manifest records",
            fix=fix,
        )
    return column


@dataclass(frozen=True)
class MemberPlace:
    """Where one member of a sample lies in its shard."""

    offset: int
    length: int
    crc32: int


class SplitIndexWriter:
    """Collects the index of one split, sample by sample, and makes its columns.

    Call ``add_sample`` for each sample of a shard in the order of its tar, then ``end_shard``; finally ``finish``.
    """

    def __init__(self, split: str) -> None:
        self.split = split
        self._shards: list[ShardEntry] = []
        self._samples = 0
        self._samples_before_shard = 0
        self._keys = bytearray()
        self._key_start = array("q", [0])
        self._members: dict[str, tuple[array[int], array[int], array[int]]] = {}
        self._labels = array("i")
        self._heights, self._widths = array("i"), array("i")
        self._token_start = array("q", [0])

    def add_sample(
        self,
        key: str,
        members: Mapping[str, MemberPlace],
        *,
        label: int | None = None,
        tokens: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Record one sample: its key, members by extension, class number, token count, and (height, width)."""
        for extension in members:
            if extension not in self._members:
                absent = array("q", [0]) * self._samples, array("q", [-1]) * self._samples
                self._members[extension] = (*absent, array("q", [0]) * self._samples)
        nowhere = MemberPlace(0, -1, 0)
        for extension, (offset, length, crc32) in self._members.items():
            place = members.get(extension, nowhere)
            offset.append(place.offset)
            length.append(place.length)
            crc32.append(place.crc32)
        self._keys += key.encode()
        self._key_start.append(len(self._keys))
        self._labels.append(-1 if label is None else label)
        height, width = size or (0, 0)
        self._heights.append(height)
        self._widths.append(width)
        self._token_start.append(self._token_start[-1] + (tokens or 0))
        self._samples += 1

    def end_shard(self, path: str, *, size: int, sha256: str, etag: str | None = None) -> None:
        """Close the shard that holds all samples added since the last call."""
        samples = self._samples - self._samples_before_shard
        self._shards.append(ShardEntry(path=path, samples=samples, size=size, sha256=sha256, etag=etag))
        self._samples_before_shard = self._samples

    def finish(self) -> tuple[SplitEntry, Iterator[tuple[str, bytes]]]:
        """Return the split's part of the manifest and the index files to write, as (path below the root, bytes)."""
        assert self._samples == self._samples_before_shard, "end_shard was not called for the last samples"
        files = {name: _npy_bytes(column) for name, column in self._columns().items()}
        entry = SplitEntry(
            samples=self._samples,
            tokens=self._token_start[-1] if self._token_start[-1] else None,
            shards=tuple(self._shards),
            columns={
                name: ColumnEntry(
                    dtype=column.dtype.str, shape=column.shape, sha256=hashlib.sha256(files[name]).hexdigest()
                )
                for name, column in self._columns().items()
            },
        )
        return entry, ((column_path(self.split, name), content) for name, content in files.items())

    def _columns(self) -> dict[str, np.ndarray]:
        columns = {
            "key_start": np.asarray(self._key_start, dtype="<i8"),
            "key_bytes": np.frombuffer(bytes(self._keys), dtype=np.uint8),
        }
        for extension, (offset, length, crc32) in self._members.items():
            columns[f"offset.{extension}"] = np.asarray(offset, dtype="<i8")
            columns[f"length.{extension}"] = np.asarray(length, dtype="<i8")
            columns[f"crc32.{extension}"] = np.asarray(crc32, dtype="<u4")
        labels = np.asarray(self._labels, dtype="<i4")
        if np.any(labels >= 0):
            columns["label"] = labels
        if any(self._heights):
            columns["height"] = np.asarray(self._heights, dtype="<i4")
            columns["width"] = np.asarray(self._widths, dtype="<i4")
        if self._token_start[-1]:
            columns["token_start"] = np.asarray(self._token_start, dtype="<i8")
        return columns


def _npy_bytes(column: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, column, allow_pickle=False)
    return buffer.getvalue()
