"""Checking a data set against its index, byte by byte, and naming everything that is wrong with it."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sixfold.errors import DataError, EnvironmentFault, Fault
from sixfold_data.build import TRAIN, VAL
from sixfold_data.decode import IMAGE_EXTENSIONS, UndecodableError, decode_image, decode_member
from sixfold_data.index import MANIFEST_NAME, Manifest, SplitIndex, column_path, open_split, read_manifest
from sixfold_data.store import Store
from sixfold_data.tokenizers import STORAGE_DTYPES, make_tokenizer

Progress = Callable[[int, int], None]

_RESTORE = "copy it again from its source"
_REINDEX = "index the shards again with `sixfold data index`"
_CHECKED = frozenset({*IMAGE_EXTENSIONS, *STORAGE_DTYPES, "cls", "txt", "json", "npy"})


@dataclass
class VerifyReport:
    """What was checked, and every fault found."""

    url: str
    fingerprint: str | None = None
    shards: int = 0
    samples: int = 0
    bytes: int = 0
    faults: list[Fault] = field(default_factory=list)


def verify(store: Store, progress: Progress = lambda done, total: None) -> VerifyReport:
    """Check manifest, columns, shards and members of a data set; read everything once.

    Faults are returned, not raised. ``progress`` is told (bytes done, bytes in all).
    """
    report = VerifyReport(store.url)
    try:
        manifest = read_manifest(store)
    except DataError as error:
        report.faults.extend(error.faults)
        return report
    report.fingerprint = manifest.fingerprint
    for split in (TRAIN, VAL):
        if split not in manifest.splits:
            report.faults.append(
                Fault(
                    what=f"there is no split {split!r}",
                    where=f"{store.url}/{MANIFEST_NAME}",
                    allowed="a data set to train on has train and val",
                    fix="build with --val-fraction above 0, or name shards for it: sixfold data index --split val=...",
                )
            )
    try:
        vocabulary = None if manifest.tokenizer is None else make_tokenizer(manifest.tokenizer, store).vocabulary_size
    except (DataError, EnvironmentFault) as error:
        report.faults.extend(error.faults)
        vocabulary = None
    total = sum(shard.size for entry in manifest.splits.values() for shard in entry.shards)
    for split in manifest.splits:
        _verify_split(store, manifest, split, vocabulary, report, lambda: progress(report.bytes, total))
    return report


def _verify_split(
    store: Store,
    manifest: Manifest,
    split: str,
    vocabulary: int | None,
    report: VerifyReport,
    shard_done: Callable[[], None],
) -> None:
    report.faults.extend(_column_faults(store, manifest, split))
    try:
        index = open_split(store, manifest, split)
    except DataError as error:
        report.faults.extend(fault for fault in error.faults if fault.where not in {f.where for f in report.faults})
        return
    for number, shard in enumerate(index.shards):
        report.faults.extend(_shard_faults(store, manifest, index, vocabulary, number))
        report.shards += 1
        report.samples += shard.samples
        report.bytes += shard.size
        shard_done()


def _column_faults(store: Store, manifest: Manifest, split: str) -> Iterator[Fault]:
    for name, entry in manifest.splits[split].columns.items():
        path = column_path(split, name)
        try:
            digest = hashlib.sha256(store.read_file(path)).hexdigest()
        except (DataError, EnvironmentFault) as error:
            yield from error.faults
            continue
        if digest != entry.sha256:
            yield Fault(
                what="this column of the index has changed since it was written: its sha256 differs",
                where=f"{store.url}/{path}",
                fix=_REINDEX,
            )


def _shard_faults(
    store: Store, manifest: Manifest, index: SplitIndex, vocabulary: int | None, number: int
) -> Iterator[Fault]:
    """Check one shard as a whole and, where it differs, each of its samples, so that the damage has a name."""
    shard = index.shards[number]
    where = f"{store.url}/{shard.path}"
    try:
        size, etag = store.size(shard.path), store.etag(shard.path)
        content = _map(store.local_path(shard.path), size)
    except (DataError, EnvironmentFault) as error:
        yield from error.faults
        return
    if size != shard.size:
        yield Fault(
            what=f"the shard has {size} bytes, the index says {shard.size}",
            where=where,
            fix=_RESTORE + (": it is truncated" if size < shard.size else f", or {_REINDEX}"),
        )
    elif shard.etag is not None and etag != shard.etag:
        yield Fault(what=f"the shard's etag is {etag}, the index says {shard.etag}", where=where, fix=_REINDEX)
    elif hashlib.sha256(content.data).hexdigest() != shard.sha256:
        yield Fault(
            what="the shard's bytes have changed: its sha256 differs from the index's", where=where, fix=_RESTORE
        )
    for sample in range(int(index.shard_start[number]), int(index.shard_start[number + 1])):
        for reason in _sample_faults(manifest, index, vocabulary, sample, content):
            yield Fault(what=reason, where=f"{where}: {index.key(sample)}", fix=_RESTORE)


def _map(file: Path, size: int) -> np.ndarray:
    """Return a file's bytes ``[size]`` without reading them yet; an empty file cannot be mapped."""
    return np.memmap(file, dtype=np.uint8, mode="r") if size else np.zeros(0, dtype=np.uint8)


def _sample_faults(
    manifest: Manifest, index: SplitIndex, vocabulary: int | None, sample: int, content: np.ndarray
) -> Iterator[str]:
    """Yield what is wrong with one sample's members, label and tokens."""
    if index.label is not None and not -1 <= index.label[sample] < len(manifest.classes):
        yield f"the label {index.label[sample]} is out of range: there are {len(manifest.classes)} classes"
    for extension, member in index.members.items():
        start, length = int(member.offset[sample]), int(member.length[sample])
        if length < 0:
            continue
        data = content[start : start + length].tobytes()
        if start < 0 or len(data) != length:
            yield f"its .{extension} lies at bytes {start} to {start + length}, beyond the shard's end"
        elif zlib.crc32(data) != member.crc32[sample]:
            yield f"the checksum of its .{extension} does not match the index"
        elif extension in _CHECKED:
            yield from _member_faults(index, vocabulary, sample, extension, data)


def _member_faults(
    index: SplitIndex, vocabulary: int | None, sample: int, extension: str, data: bytes
) -> Iterator[str]:
    try:
        if extension in IMAGE_EXTENSIONS:
            yield from _size_faults(index, sample, decode_image(data).shape[:2])
        elif extension != "cls":  # the index holds the label; a member may be a class's name
            decoded = decode_member(extension, data)
            if extension in STORAGE_DTYPES:
                yield from _token_faults(index, vocabulary, sample, np.asarray(decoded))
    except UndecodableError as error:
        yield str(error)


def _size_faults(index: SplitIndex, sample: int, size: tuple[int, ...]) -> Iterator[str]:
    if index.height is not None and index.width is not None:
        indexed = (int(index.height[sample]), int(index.width[sample]))
        if size != indexed:
            yield "the image is {}x{}, the index says {}x{}".format(*size, *indexed)


def _token_faults(index: SplitIndex, vocabulary: int | None, sample: int, tokens: np.ndarray) -> Iterator[str]:
    if vocabulary is not None and tokens.max(initial=0) >= vocabulary:
        yield f"it holds token {tokens.max()}, but the vocabulary has {vocabulary}"
    if index.token_start is not None:
        counted = int(index.token_start[sample + 1] - index.token_start[sample])
        if counted != len(tokens):
            yield f"it holds {len(tokens)} tokens, the index says {counted}"
