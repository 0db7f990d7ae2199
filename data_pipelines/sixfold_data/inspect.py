"""Looking at a data set: what it holds, and a few of its samples as a picture grid or as text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from sixfold_data.decode import IMAGE_EXTENSIONS, decode_image
from sixfold_data.index import Kind, LatentsEntry, Manifest, SplitIndex, open_split
from sixfold_data.store import Store
from sixfold_data.tokenizers import STORAGE_DTYPES, make_tokenizer

SMALLEST_CELL_PIXELS = 48
LARGEST_CELL_PIXELS = 160
_TITLE_PIXELS = 14


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
    """A decoded image ``[h, w, 3]`` and what to write below it."""

    pixels: UInt8[np.ndarray, "h w 3"]
    title: str


def summarise(store: Store, manifest: Manifest) -> Summary:
    """Return the counts of a data set; reads the index only."""
    tokenizer = make_tokenizer(manifest.tokenizer) if manifest.tokenizer is not None else None
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
    """Decode ``count`` samples spread evenly over a split, titled by class, caption or key."""
    index = open_split(store, manifest, split)
    chosen = np.unique(np.linspace(0, len(index) - 1, num=min(count, len(index))).astype(np.int64))
    return [_read_picture(store, manifest, index, sample) for sample in chosen.tolist()]


def _read_picture(store: Store, manifest: Manifest, index: SplitIndex, sample: int) -> Picture:
    content = _read_member(store, index, sample, (*IMAGE_EXTENSIONS, "npy"))
    pixels = decode_image(content, channels=3) if manifest.latents is None else latent_pixels(content, manifest.latents)
    if index.label is not None and index.label[sample] >= 0:
        title = manifest.classes[index.label[sample]]
    elif "txt" in index.members:
        title = _read_member(store, index, sample, ("txt",)).decode(errors="replace")
    else:
        title = index.key(sample).rpartition("/")[2]
    return Picture(pixels, title)


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


def read_text(store: Store, manifest: Manifest, split: str, characters: int) -> tuple[str, str]:
    """Return (key, beginning) of the first document of a split."""
    index = open_split(store, manifest, split)
    assert manifest.tokenizer is not None, "a text data set records its tokenizer"
    extension = next(name for name in STORAGE_DTYPES if name in index.members)
    content = _read_member(store, index, 0, (extension,), limit=8 * characters)
    text = make_tokenizer(manifest.tokenizer).decode(np.frombuffer(content, dtype=STORAGE_DTYPES[extension]))
    return index.key(0), text[:characters]


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


def draw_grid(pictures: Sequence[Picture], columns: int) -> Image.Image:
    """Draw pictures with their titles below, row by row; tiny ones are enlarged by whole factors."""
    largest = max(max(picture.pixels.shape[:2]) for picture in pictures)
    enlarge = max(1, -(-SMALLEST_CELL_PIXELS // largest))
    cell = min(LARGEST_CELL_PIXELS, largest * enlarge)
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * (cell + 4), rows * (cell + _TITLE_PIXELS + 4)), "white")
    pen = ImageDraw.Draw(grid)
    for number, picture in enumerate(pictures):
        left, top = number % columns * (cell + 4) + 2, number // columns * (cell + _TITLE_PIXELS + 4) + 2
        grid.paste(fit(Image.fromarray(picture.pixels), cell), (left, top))
        title = picture.title.encode("latin-1", errors="replace").decode("latin-1")
        pen.text((left, top + cell), title[: cell // 6], fill="black")
    return grid


def fit(image: Image.Image, side: int) -> Image.Image:
    """Scale an image so that its longer side is ``side``; enlarging keeps pixels square and sharp."""
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
