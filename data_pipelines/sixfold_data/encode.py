"""Writing a data set's latents: pieces of the images in stored order, each a shard that any process may make.

A job's staging folder lies beside its output. A piece is made of a fixed run of samples, whoever makes it, and is done
when its ``done.json`` is there: a job that was stopped goes on with the pieces that are missing, on any number of
processes, and the data set is the same. When all are there, their shards get their final names and one index.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, UInt8
from pydantic import Field

from sixfold.config.base import Config
from sixfold.errors import DataError
from sixfold_data.buckets import Shape, nearest_buckets
from sixfold_data.build import TRAIN, BuildReport, Rejects, check_output
from sixfold_data.config import CacheConfig
from sixfold_data.decode import IMAGE_EXTENSIONS, UndecodableError, decode_images
from sixfold_data.index import (
    FORMAT,
    MANIFEST_NAME,
    LatentsEntry,
    MemberPlace,
    SplitEntry,
    SplitIndex,
    SplitIndexWriter,
    column_path,
    open_split,
    read_manifest,
)
from sixfold_data.latents import MEMBER, npy_header, stored_dtype
from sixfold_data.members import MemberReader, Unreadable
from sixfold_data.shards import SplitWriter
from sixfold_data.store import open_store, write_atomically

JOB_NAME = "job.json"
_DONE = "done.json"
_WHOLE = 1 << 62
"""A piece is one shard, however large."""
_CARRIED = ("txt", "cls")
_DECODING_THREADS = min(8, len(os.sched_getaffinity(0)))
_BATCHES_AHEAD = 2


class EncodeJob(Config):
    """Everything that decides what a job writes; kept in its staging folder, so that only the same job goes on there.

    ``latents`` lacks the statistics, which are known at the end.
    """

    data: str = Field(description="Folder or URL of the images.")
    run: str = Field(description="Folder of the codec's run.")
    step: int = Field(description="Step of the codec's checkpoint.")
    latents: LatentsEntry = Field(description="What is written.")
    sizes: tuple[tuple[int, int], ...] = Field(
        min_length=1, description="Heights and widths that images are brought to, each to the nearest aspect ratio."
    )
    factor: int = Field(ge=1, description="Pixels a side of an image in one cell of its latent.")
    channels: int = Field(description="Channels of the images.")
    batch: int = Field(ge=1, description="Images encoded at once.")
    piece_samples: int = Field(ge=1, description="Samples in a piece.")
    corrupt_budget: int = Field(ge=0, description="Unreadable images left out before a piece gives up.")


class Encoded(NamedTuple):
    """One batch as it is stored, ``[n, ...]``, and, of moments, each channel's sums of z and of its expected square."""

    stored: np.ndarray
    total: Float64[np.ndarray, " channels"]
    squares: Float64[np.ndarray, " channels"]


Encode = Callable[[UInt8[np.ndarray, "n h w c"]], Encoded]


@dataclass(frozen=True)
class Piece:
    """A run of a split's samples."""

    split: str
    number: int
    samples: range

    @property
    def name(self) -> str:
        """Its folder in the staging folder."""
        return f"{self.split}-{self.number:06d}"


class PieceRecord(Config):
    """``done.json``: what a finished piece holds."""

    entry: SplitEntry = Field(description="Its shard and index.")
    count: int = Field(description="Values of each channel.")
    total: tuple[float, ...] = Field(description="Sum of each channel's latents.")
    squares: tuple[float, ...] = Field(description="Sum of their expected squares.")
    unreadable: tuple[str, ...] = Field(description="Images left out, and why.")


def staging_folder(out: Path) -> Path:
    """Where a job for this output keeps its pieces."""
    return out.resolve().with_name(f"{out.resolve().name}.encoding")


def open_job(job: EncodeJob, out: Path) -> Path:
    """Make a job's staging folder, or take up the one that an earlier attempt of the same job left.

    Raises:
        DataError: the output is not empty, or another job's pieces are there.
    """
    check_output(out)
    staging = staging_folder(out)
    file = staging / JOB_NAME
    if file.exists() and EncodeJob.model_validate_json(file.read_bytes()) != job:
        raise DataError.of(
            "an unfinished job of another codec, data set or size has left its pieces here",
            where=str(staging),
            fix="remove that folder, or name another one with --out",
        )
    staging.mkdir(parents=True, exist_ok=True)
    write_atomically(file, job.model_dump_json(indent=1).encode())
    return staging


def pieces_of(job: EncodeJob) -> list[Piece]:
    """All pieces of a job, in order."""
    manifest = read_manifest(open_store(job.data, CacheConfig()))
    return [
        Piece(split, number, range(start, min(start + job.piece_samples, entry.samples)))
        for split, entry in manifest.splits.items()
        for number, start in enumerate(range(0, entry.samples, job.piece_samples))
    ]


def finished_samples(job: EncodeJob, staging: Path) -> int:
    """Samples of the pieces that are whole."""
    return sum(len(piece.samples) for piece in pieces_of(job) if is_done(staging, piece))


def is_done(staging: Path, piece: Piece) -> bool:
    """Whether a piece is whole."""
    return (staging / piece.name / _DONE).exists()


def encode_pieces(
    job: EncodeJob, staging: Path, encode: Encode, *, rank: int, ranks: int, progress: Callable[[int], None]
) -> None:
    """Make those of a rank's pieces that are missing; ``progress`` is told the samples of each batch.

    Raises:
        DataError: more images of a piece than the budget cannot be read, or latents of one are not finite.
    """
    store = open_store(job.data, CacheConfig())
    manifest = read_manifest(store)
    readers = {split: MemberReader(store, open_split(store, manifest, split)) for split in manifest.splits}
    for piece in pieces_of(job)[rank::ranks]:
        if not is_done(staging, piece):
            _encode_piece(job, staging, piece, readers[piece.split], encode, progress)


def _encode_piece(
    job: EncodeJob,
    staging: Path,
    piece: Piece,
    reader: MemberReader,
    encode: Encode,
    progress: Callable[[int], None],
) -> None:
    folder = staging / piece.name
    shutil.rmtree(folder, ignore_errors=True)
    count = 0
    total, squares = (np.zeros(job.latents.channels) for _ in range(2))
    rejects = Rejects(job.corrupt_budget)
    with SplitWriter(folder, piece.split, shard_bytes=_WHOLE) as writer:
        for batch in _read_ahead(job, piece, reader):
            for key, reason in batch.unreadable:
                rejects.add(key, reason)
            if batch.samples:
                encoded = encode(batch.pixels)
                _require_finite(encoded.stored, [reader.index.key(sample) for sample in batch.samples], job)
                total, squares = total + encoded.total, squares + encoded.squares
                cells = batch.size[0] // job.factor, batch.size[1] // job.factor
                count += len(encoded.stored) * cells[0] * cells[1]
                header = npy_header(job.latents, cells)
                for sample, members, values in zip(batch.samples, batch.members, encoded.stored, strict=True):
                    label = None if reader.index.label is None else int(reader.index.label[sample])
                    stored = {MEMBER: header + np.ascontiguousarray(values).tobytes(), **members}
                    writer.add(reader.index.key(sample), stored, label=None if label == -1 else label, size=cells)
            progress(len(batch.samples) + len(batch.unreadable))
        record = PieceRecord(
            entry=writer.finish(),
            count=count,
            total=tuple(total.tolist()),
            squares=tuple(squares.tolist()),
            unreadable=tuple(str(fault) for fault in rejects.faults),
        )
    write_atomically(folder / _DONE, record.model_dump_json().encode())


def _require_finite(stored: np.ndarray, keys: Sequence[str], job: EncodeJob) -> None:
    """Raise DataError where latents of a batch cannot be kept: training on them would end in NaN much later."""
    if stored.dtype.kind != "f":
        return
    for key, values in zip(keys, stored, strict=True):
        if not np.isfinite(values).all():
            kind = "not numbers" if np.isnan(values).any() else f"beyond {np.finfo(stored.dtype).max:g}"
            raise DataError.of(
                f"latents of sample {key} are {kind}, and cannot be kept in {stored.dtype}",
                where=job.data,
                allowed="finite moments",
                fix=f"look at this image and what the codec of {job.run} makes of it; name another run if its training "
                "has diverged",
            )


class _Batch(NamedTuple):
    size: Shape
    samples: list[int]
    pixels: UInt8[np.ndarray, "n h w c"]
    members: list[dict[str, bytes]]
    unreadable: list[tuple[str, str]]


def _read_ahead(job: EncodeJob, piece: Piece, reader: MemberReader) -> Iterator[_Batch]:
    """Yield batches of one size each, read one by one ahead of the one that is encoded; several threads decode."""
    with ThreadPoolExecutor(1) as readers, ThreadPoolExecutor(_DECODING_THREADS) as decoders:
        ahead: deque[Future[_Batch]] = deque()
        for run in _runs(job, piece, reader):
            ahead.append(readers.submit(_read, job, reader, decoders, *run))
            if len(ahead) > _BATCHES_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _runs(job: EncodeJob, piece: Piece, reader: MemberReader) -> Iterator[tuple[Shape, np.ndarray]]:
    """Yield each batch's size and samples: size by size, samples in stored order."""
    samples, nearest = np.arange(piece.samples.start, piece.samples.stop), np.zeros(len(piece.samples), dtype=np.int64)
    if len(job.sizes) > 1:
        nearest = nearest_buckets(*sizes_of(reader, samples), job.sizes)
    for number, size in enumerate(job.sizes):
        mine = samples[nearest == number]
        for start in range(0, len(mine), job.batch):
            yield size, mine[start : start + job.batch]


def sizes_of(reader: MemberReader, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the heights and widths of images.

    Raises:
        DataError: the index does not know them.
    """
    height, width = reader.index.height, reader.index.width
    if height is None or width is None:
        raise DataError.of(
            "the index has no heights and widths, which buckets go by",
            where=reader.store.url,
            fix="index the shards again with `sixfold data index`",
        )
    return height[samples].clip(1), width[samples].clip(1)


def _read(job: EncodeJob, reader: MemberReader, decoders: Executor, size: Shape, samples: np.ndarray) -> _Batch:
    """Read and decode some samples, with the members that go with them unchanged."""
    images = reader.read(IMAGE_EXTENSIONS, samples)
    carried = {
        extension: reader.read((extension,), samples) for extension in _CARRIED if extension in reader.index.members
    }
    pixels = _decoded(job, decoders, size, [image for image in images if not isinstance(image, Unreadable)])
    batch = _Batch(size, [], np.empty((len(samples), *size, job.channels), dtype=np.uint8), [], [])
    for sample, image, *members in zip(samples.tolist(), images, *carried.values(), strict=True):
        decoded = image if isinstance(image, Unreadable) else next(pixels)
        faults = [
            part.reason if isinstance(part, Unreadable) else str(part)
            for part in (decoded, *members)
            if isinstance(part, Exception)
        ]
        if faults:
            batch.unreadable.append((reader.index.key(sample), faults[0]))
            continue
        batch.pixels[len(batch.samples)] = decoded
        batch.samples.append(sample)
        batch.members.append(dict(zip(carried, members, strict=True)))
    return batch._replace(pixels=batch.pixels[: len(batch.samples)])


def _decoded(
    job: EncodeJob, decoders: Executor, size: Shape, contents: list[bytes]
) -> Iterator[UInt8[np.ndarray, "h w c"] | UndecodableError]:
    """Decode images, a share in each thread, in their order."""
    share = -(-len(contents) // _DECODING_THREADS) or 1
    parts = [contents[start : start + share] for start in range(0, len(contents), share)]
    return chain.from_iterable(decoders.map(partial(decode_images, channels=job.channels, size=size), parts))


def finish_job(job: EncodeJob, staging: Path, out: Path) -> BuildReport:
    """Give the pieces of a finished job one index and the output its name."""
    source = read_manifest(open_store(job.data, CacheConfig()))
    pieces = pieces_of(job)
    records = {piece: PieceRecord.model_validate_json((staging / piece.name / _DONE).read_bytes()) for piece in pieces}
    whole = staging / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    splits = {}
    for split in source.splits:
        mine = {piece: record for piece, record in records.items() if piece.split == split}
        splits[split] = _merge(staging, whole, split, mine)
    statistics_from = [record for piece, record in records.items() if piece.split in (TRAIN, *list(splits)[:1])]
    made = {"kind": "latents", "latents": _with_statistics(job.latents, statistics_from), "splits": splits, "text": {}}
    size = job.sizes[0] if len(job.sizes) == 1 else None
    manifest = source.model_copy(update={**made, "format": FORMAT, "image_size": size}).sealed()
    write_atomically(whole / MANIFEST_NAME, manifest.to_bytes())
    if out.exists():  # empty, as open_job saw to
        out.rmdir()
    whole.rename(out.resolve())
    shutil.rmtree(staging)
    unreadable = [line for record in records.values() for line in record.unreadable]
    return BuildReport(
        out=str(out),
        kind="latents",
        samples={split: entry.samples for split, entry in splits.items()},
        bytes={split: sum(shard.size for shard in entry.shards) for split, entry in splits.items()},
        tokens={},
        classes=source.classes,
        fingerprint=manifest.fingerprint,
        unreadable=(),
        remarks=unreadable,
    )


def _merge(staging: Path, whole: Path, split: str, records: dict[Piece, PieceRecord]) -> SplitEntry:
    """Link a split's shards under their final names and write one index for them."""
    writer = SplitIndexWriter(split)
    (whole / split / "index").mkdir(parents=True)
    for number, (piece, record) in enumerate(records.items()):
        folder, entry = staging / piece.name, record.entry
        columns = {name: np.load(folder / column_path(split, name)) for name in entry.columns}
        index = SplitIndex(split, entry, columns)
        for sample in range(entry.samples):
            places = {
                extension: MemberPlace(int(at.offset[sample]), int(at.length[sample]), int(at.crc32[sample]))
                for extension, at in index.members.items()
            }
            label = None if index.label is None else int(index.label[sample])
            assert index.height is not None, "pieces have sizes"
            assert index.width is not None, "pieces have sizes"
            size = int(index.height[sample]), int(index.width[sample])
            writer.add_sample(index.key(sample), places, label=None if label == -1 else label, size=size)
        for shard in entry.shards:
            path = f"{split}/shard-{number:06d}.tar"
            os.link(folder / shard.path, whole / path)
            writer.end_shard(path, size=shard.size, sha256=shard.sha256)
    merged, files = writer.finish()
    for path, content in files:
        write_atomically(whole / path, content)
    return merged


def _with_statistics(entry: LatentsEntry, records: list[PieceRecord]) -> LatentsEntry:
    """Fill in each channel's mean and standard deviation; pieces are added in their order, whoever made them."""
    if entry.form == "codes":
        return entry
    count = sum(record.count for record in records)
    mean = np.sum([record.total for record in records], axis=0) / count
    variance = np.sum([record.squares for record in records], axis=0) / count - np.square(mean)
    deviation = np.sqrt(np.maximum(variance, 1e-12))
    return entry.model_copy(update={"mean": tuple(mean.tolist()), "std": tuple(deviation.tolist())})


def stored_batch(values: np.ndarray, entry: LatentsEntry) -> np.ndarray:
    """Return a batch in the stored type."""
    return values.astype(stored_dtype(entry))
