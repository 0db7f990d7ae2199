"""Looking at a data set: what it holds, and a few of its samples: pictures with their captions, or documents."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from sixfold_data.decode import IMAGE_EXTENSIONS, decode_image
from sixfold_data.index import Kind, LatentsEntry, Manifest, SplitIndex, open_split
from sixfold_data.store import Store
from sixfold_data.tokenizers import STORAGE_DTYPES, make_tokenizer


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """Counts of one split; ``labels`` are counts by class name."""

    samples: int
    tokens: int | None
    shards: int
    bytes: int
    labels: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a data set holds."""

    url: str
    kind: Kind
    fingerprint: str
    tokenizer: str | None
    vocabulary: int | None
    image_size: tuple[int, int] | None
    channels: int | None
    classes: int
    splits: Mapping[str, SplitSummary]


@dataclass(frozen=True)
class Picture:
    """A decoded image ``[h, w, 3]``, its key, and what it shows: its caption or class, None where there is neither."""

    pixels: UInt8[np.ndarray, "h w 3"]
    key: str
    caption: str | None

    @property
    def title(self) -> str:
        """What to write below it: what it shows, else the last part of its key."""
        return self.key.rpartition("/")[2] if self.caption is None else self.caption


@dataclass(frozen=True)
class Excerpt:
    """The beginning of one document of a text data set."""

    key: str
    text: str


def summarise(store: Store, manifest: Manifest) -> Summary:
    """Return the counts of a data set; reads the index only."""
    tokenizer = make_tokenizer(manifest.tokenizer, store) if manifest.tokenizer is not None else None
    return Summary(
        url=store.url,
        kind=manifest.kind,
        fingerprint=manifest.fingerprint,
        tokenizer=manifest.tokenizer["type"] if manifest.tokenizer is not None else None,
        vocabulary=tokenizer.vocabulary_size if tokenizer is not None else None,
        image_size=manifest.image_size,
        channels=manifest.channels,
        classes=len(manifest.classes),
        splits={name: _summarise_split(manifest, open_split(store, manifest, name)) for name in manifest.splits},
    )


def _summarise_split(manifest: Manifest, index: SplitIndex) -> SplitSummary:
    labels: dict[str, int] = {}
    if index.label is not None:
        counts = np.bincount(index.label[index.label >= 0], minlength=len(manifest.classes))
        labels = dict(zip(manifest.classes, counts.tolist(), strict=False))
    return SplitSummary(
        samples=len(index),
        tokens=index.entry.tokens,
        shards=len(index.shards),
        bytes=sum(shard.size for shard in index.shards),
        labels=labels,
    )


def read_pictures(store: Store, manifest: Manifest, split: str, count: int) -> list[Picture]:
    """Decode ``count`` samples spread evenly over a split."""
    index = open_split(store, manifest, split)
    return [_read_picture(store, manifest, index, sample) for sample in _spread(index, count)]


def _spread(index: SplitIndex, count: int) -> list[int]:
    """Return the numbers of ``count`` samples, or of all there are, from the first to the last."""
    chosen: list[int] = np.unique(np.linspace(0, len(index) - 1, num=min(count, len(index))).astype(np.int64)).tolist()
    return chosen


def _read_picture(store: Store, manifest: Manifest, index: SplitIndex, sample: int) -> Picture:
    content = _read_member(store, index, sample, (*IMAGE_EXTENSIONS, "npy"))
    pixels = decode_image(content, channels=3) if manifest.latents is None else latent_pixels(content, manifest.latents)
    caption = None
    if "txt" in index.members and index.members["txt"].length[sample] >= 0:
        caption = " ".join(_read_member(store, index, sample, ("txt",)).decode(errors="replace").split())
    elif index.label is not None and index.label[sample] >= 0:
        caption = manifest.classes[index.label[sample]]
    return Picture(pixels, index.key(sample), caption)


def latent_pixels(content: bytes, entry: LatentsEntry) -> UInt8[np.ndarray, "h w 3"]:
    """Show a latent's first three channels, three standard deviations either way; codes as shades."""
    values = np.load(io.BytesIO(content), allow_pickle=False).astype(np.float64)
    if entry.form == "codes":
        assert entry.codebook_size is not None, "codes come with the size of their codebook"
        shades = np.broadcast_to(values / entry.codebook_size, (3, *values.shape))
    else:
        centre, scale = (np.asarray(numbers)[:, None, None] for numbers in (entry.mean, entry.std))
        means = (values[: entry.channels] - centre) / (6.0 * scale) + 0.5
        shades = means[np.arange(3) % entry.channels]
    return np.round(255.0 * shades.clip(0.0, 1.0)).astype(np.uint8).transpose(1, 2, 0)


def read_texts(store: Store, manifest: Manifest, split: str, count: int, characters: int) -> list[Excerpt]:
    """Return the beginnings of ``count`` documents spread evenly over a split."""
    index = open_split(store, manifest, split)
    assert manifest.tokenizer is not None, "a text data set records its tokenizer"
    tokenizer = make_tokenizer(manifest.tokenizer, store)
    extension = next(name for name in STORAGE_DTYPES if name in index.members)
    excerpts = []
    for sample in _spread(index, count):
        content = _read_member(store, index, sample, (extension,), limit=8 * characters)
        text = tokenizer.decode(np.frombuffer(content, dtype=STORAGE_DTYPES[extension]))
        excerpts.append(Excerpt(index.key(sample), text[:characters]))
    return excerpts


def _read_member(
    store: Store, index: SplitIndex, sample: int, extensions: Sequence[str], limit: int | None = None
) -> bytes:
    for extension in extensions:
        member = index.members.get(extension)
        if member is not None and member.length[sample] >= 0:
            length = int(member.length[sample])
            shard = index.shards[int(index.shard_of(np.asarray(sample)))].path
            return store.read(shard, int(member.offset[sample]), length if limit is None else min(length, limit))
    raise AssertionError(f"sample {index.key(sample)} has none of {', '.join(extensions)}")
