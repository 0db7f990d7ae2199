"""Small indexed data sets whose samples tell their own number, and a synthetic index of any size."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sixfold_data.build import BuildOptions, building
from sixfold_data.index import FORMAT, ColumnEntry, Manifest, ShardEntry, SplitEntry, column_path
from sixfold_data.tokenizers import ByteTokenizer


def png(number: int) -> bytes:
    """A 4x4 grey image whose first two pixels hold a number below 65536 in base 256."""
    pixels = np.full((4, 4), 100, dtype=np.uint8)
    pixels[0, :2] = number // 256, number % 256
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def numbers_of(images) -> list[int]:
    """Read the numbers back from a batch's images."""
    high, low = ((images[:, 0, 0, :2].double() + 1) * 127.5).round().long().unbind(1)
    return (high * 256 + low).tolist()


def make_images(root: Path, train: int = 100, val: int = 10, *, first: int = 0, per_shard: int = 10) -> Path:
    """Numbered images with their number modulo 10 as label; about ``per_shard`` of them in a shard."""
    bytes_each = 1024 + len(png(0)) + 1024 + 1
    options = BuildOptions(out=root, val_fraction=0.1, shard_bytes=per_shard * (bytes_each + 20))
    with building(options) as work:
        for number in range(first, first + train + val):
            split = "train" if number < first + train else "val"
            label = number % 10
            members = {"png": png(number), "cls": str(label).encode()}
            work.writers[split].add(f"s{number:06d}", members, label=label)
        work.finish("images", classes=[str(digit) for digit in range(10)], image_size=(4, 4), channels=1)
    return root


def make_mixed_images(
    root: Path, sizes: Sequence[tuple[int, int]], *, captions: Sequence[str] = (), val: int = 4, per_shard: int = 10
) -> Path:
    """Grey images of the given heights and widths, sample ``n`` all of shade ``n % 256``; the last ``val`` are val."""
    options = BuildOptions(out=root, val_fraction=0.1 if val else 0.0, shard_bytes=per_shard * 3600)
    with building(options) as work:
        for number, size in enumerate(sizes):
            buffer = io.BytesIO()
            Image.fromarray(np.full(size, number % 256, dtype=np.uint8)).save(buffer, "PNG")
            members = {"png": buffer.getvalue()} | ({"txt": captions[number].encode()} if captions else {})
            members["pad"] = bytes(max(0, 1024 - sum(map(len, members.values()))))  # shards of even length
            split = "val" if number >= len(sizes) - val else "train"
            work.writers[split].add(f"s{number:06d}", members, size=size)
        tokenizer = ByteTokenizer().description() if captions else None
        work.finish("image-text" if captions else "images", tokenizer=tokenizer, channels=1)
    return root


def shades_of(images) -> list[int]:
    """Read the shades back from a batch of images of one shade each."""
    return ((images[:, 0, 0, 0].double() + 1) * 127.5).round().long().tolist()


def make_text(root: Path, documents: Sequence[bytes], *, shard_bytes: int = 4096) -> Path:
    """Documents of bytes as both splits, many shards."""
    tokenizer = ByteTokenizer()
    with building(BuildOptions(out=root, val_fraction=0.5, shard_bytes=shard_bytes)) as work:
        for split in ("train", "val"):
            for number, document in enumerate(documents):
                tokens = np.append(np.frombuffer(document, dtype=np.uint8), 256).astype("<u2")
                work.writers[split].add(f"d{number:06d}", {"u16": tokens.tobytes()}, tokens=len(tokens))
        work.finish("text", tokenizer=tokenizer.description())
    return root


def make_synthetic_index(root: Path, *, samples: int, shards: int, content: bytes) -> Path:
    """An index of any number of samples that all share one stored image: sparse columns, one real shard."""
    per_shard = samples // shards
    columns: dict[str, ColumnEntry] = {}
    for name, dtype, shape in (
        ("key_bytes", "|u1", (samples * 2,)),
        ("key_start", "<i8", (samples + 1,)),
        ("offset.png", "<i8", (samples,)),
        ("length.png", "<i8", (samples,)),
        ("crc32.png", "<u4", (samples,)),
    ):
        path = root / column_path("train", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        column = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        if name == "length.png":
            column[:] = len(content)
        if name == "crc32.png":
            column[:] = zlib.crc32(content)
        columns[name] = ColumnEntry(dtype=dtype, shape=shape, sha256="0" * 64)
    (root / "train" / "shard.tar").write_bytes(content)
    shard = ShardEntry(path="train/shard.tar", samples=per_shard, size=len(content), sha256="0" * 64)
    split = SplitEntry(samples=samples, shards=(shard,) * shards, columns=columns)
    manifest = Manifest(format=FORMAT, kind="images", image_size=(4, 4), channels=1, splits={"train": split})
    (root / "dataset.json").write_bytes(manifest.sealed().to_bytes())
    return root
