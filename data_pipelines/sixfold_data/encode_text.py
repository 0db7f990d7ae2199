"""Writing a data set again with the features that frozen text encoders make of its captions."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sixfold.errors import DataError
from sixfold_data.build import BuildReport, check_output
from sixfold_data.config import CacheConfig
from sixfold_data.images import encode_caption
from sixfold_data.index import (
    FORMAT,
    MANIFEST_NAME,
    Manifest,
    SplitEntry,
    SplitIndex,
    TextFeaturesEntry,
    open_split,
    read_manifest,
)
from sixfold_data.members import MemberReader, Unreadable
from sixfold_data.shards import DEFAULT_SHARD_BYTES, SplitWriter
from sixfold_data.store import open_store, write_atomically
from sixfold_data.text_features import DTYPES, member_of
from sixfold_data.tokenizers import Tokenizer, make_tokenizer

_CAPTION = "txt"

Encode = Callable[[Int64[Tensor, "n length"]], Float[Tensor, "n values"]]
"""From captions, as batches hold them, to an encoder's features, in the type that they are kept in."""


def write_text_features(
    path: str,
    out: Path,
    encoders: Mapping[str, Encode],
    *,
    caption_length: int,
    batch: int,
    progress: Callable[[int, int], None],
) -> BuildReport:
    """Write a captioned data set again, each sample with what each encoder makes of its caption.

    Args:
        path: folder or URL of the data set.
        out: folder to make.
        encoders: by identity.
        caption_length: tokens that captions are cut or padded to.
        batch: captions encoded at once.
        progress: told the samples that are done, and how many there are.

    Raises:
        DataError: there are no captions, one cannot be read, or its features are not finite; the output is not empty.
    """
    store = open_store(path, CacheConfig())
    manifest = read_manifest(store)
    if manifest.tokenizer is None or manifest.kind == "text":
        raise DataError.of(
            f"the data set holds {manifest.kind} without captions", where=path, fix="name image-text, or latents of it"
        )
    check_output(out)
    staging = out.resolve().with_name(f"{out.resolve().name}.tmp-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    tokenizer = make_tokenizer(manifest.tokenizer, store)
    total, done = sum(entry.samples for entry in manifest.splits.values()), 0
    try:
        text = {encoder: _write_null(staging, encoder, encode, caption_length) for encoder, encode in encoders.items()}
        splits: dict[str, SplitEntry] = {}
        for split in manifest.splits:
            reader = MemberReader(store, open_split(store, manifest, split))
            with SplitWriter(staging, split, DEFAULT_SHARD_BYTES) as writer:
                for samples in np.array_split(np.arange(len(reader.index)), -(-len(reader.index) // batch)):
                    _write_samples(writer, reader, samples, encoders, tokenizer, caption_length)
                    done += len(samples)
                    progress(done, total)
                splits[split] = writer.finish()
        return _finish(staging, out, manifest, {"splits": splits, "text": {**manifest.text, **text}})
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_samples(
    writer: SplitWriter,
    reader: MemberReader,
    samples: np.ndarray,
    encoders: Mapping[str, Encode],
    tokenizer: Tokenizer,
    caption_length: int,
) -> None:
    members = [dict(sample) for sample in _members(reader, samples)]
    captions = np.stack(
        [_caption(reader, *pair, tokenizer, caption_length) for pair in zip(samples, members, strict=True)]
    )
    for encoder, encode in encoders.items():
        features = encode(torch.from_numpy(captions))
        for sample, own, row in zip(samples.tolist(), members, features, strict=True):
            own[member_of(encoder)] = _bytes_of(row, f"caption of {reader.index.key(sample)}")
    for sample, own in zip(samples.tolist(), members, strict=True):
        label, size = _facts(reader.index, sample)
        writer.add(reader.index.key(sample), own, label=label, size=size)


def _members(reader: MemberReader, samples: np.ndarray) -> Iterator[dict[str, bytes]]:
    """Yield all members of each sample, by extension."""
    columns = {
        extension: dict(zip(present.tolist(), reader.read((extension,), present), strict=True))
        for extension, member in reader.index.members.items()
        for present in (samples[member.length[samples] >= 0],)
    }
    for sample in samples.tolist():
        own = {extension: found[sample] for extension, found in columns.items() if sample in found}
        for content in own.values():
            if isinstance(content, Unreadable):
                raise DataError.of(content.reason, where=f"{content.shard}, sample {content.key}", fix="restore it")
        yield {extension: content for extension, content in own.items() if isinstance(content, bytes)}


def _caption(
    reader: MemberReader, sample: int, members: Mapping[str, bytes], tokenizer: Tokenizer, length: int
) -> Int64[np.ndarray, " length"]:
    try:
        return encode_caption(tokenizer, members[_CAPTION], length)
    except (KeyError, UnicodeDecodeError) as error:
        raise DataError.of(
            f"sample {reader.index.key(int(sample))} has no readable caption: {error}",
            where=reader.store.url,
            fix="build the data set with a caption, in UTF-8, for every sample",
        ) from error


def _facts(index: SplitIndex, sample: int) -> tuple[int | None, tuple[int, int] | None]:
    """Return a sample's label and size, as far as the index knows them."""
    label = None if index.label is None else int(index.label[sample])
    size = (
        None if index.height is None or index.width is None else (int(index.height[sample]), int(index.width[sample]))
    )
    return None if label == -1 else label, size


def _write_null(staging: Path, encoder: str, encode: Encode, caption_length: int) -> TextFeaturesEntry:
    """Write what an encoder makes of no caption."""
    from sixfold.models.text_encoder.config import END_OF_TEXT

    (features,) = encode(torch.full((1, caption_length), END_OF_TEXT))
    content, path = _bytes_of(features, "empty caption"), f"text/{encoder}.null"
    (staging / path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(staging / path, content)
    return TextFeaturesEntry(
        dtype=next(name for name, dtype in DTYPES.items() if dtype == features.dtype),
        values=len(features),
        null=path,
        null_sha256=hashlib.sha256(content).hexdigest(),
    )


def _bytes_of(features: Float[Tensor, " values"], whose: str) -> bytes:
    if not torch.isfinite(features).all():
        raise DataError.of(
            f"an encoder's features of the {whose} are not finite",
            where="--out",
            fix="set the encoder's dtype to fp32, or mend the caption",
        )
    return features.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _finish(staging: Path, out: Path, source: Manifest, made: Mapping[str, object]) -> BuildReport:
    manifest = source.model_copy(update={**made, "format": FORMAT}).sealed()
    write_atomically(staging / MANIFEST_NAME, manifest.to_bytes())
    if out.exists():  # empty, as check_output saw to
        out.rmdir()
    staging.rename(out.resolve())
    return BuildReport(
        out=str(out),
        kind=manifest.kind,
        samples={split: entry.samples for split, entry in manifest.splits.items()},
        bytes={split: sum(shard.size for shard in entry.shards) for split, entry in manifest.splits.items()},
        tokens={},
        classes=manifest.classes,
        fingerprint=manifest.fingerprint,
        unreadable=(),
    )
