"""Building image data sets: class sub-folders become labels, or ``.txt`` files beside the images become captions."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sixfold.errors import DataError
from sixfold_data.build import (
    TRAIN,
    VAL,
    Building,
    BuildOptions,
    BuildReport,
    KeyMaker,
    assign_splits,
    building,
    check_output,
    files_below,
)
from sixfold_data.build_text import decode_text
from sixfold_data.tokenizers import ByteTokenizer
from sixfold_data.traits import GREY_MODES

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"})
FOREIGN_SUFFIXES = frozenset(
    {".heic", ".heif", ".jxl", ".jp2", ".psd", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"}
)
"""Pictures too, which Pillow reads with a plugin or not at all; whoever has such a file means it to be a sample."""
KEPT_FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}  # stored as they are; other formats become PNG

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image to be built: where it is, what the data set calls it, and what is known about it."""

    file: Path
    name: str
    split: str
    label: int | None = None
    caption: Path | None = None


@dataclass(frozen=True)
class EncodedImage:
    """An image as it will be stored; ``size`` is (height, width) in pixels."""

    extension: str
    data: bytes
    size: tuple[int, int]
    channels: int


class _Loaded(NamedTuple):
    """A sample to be written: its members by extension, and the height and width of its image."""

    members: dict[str, bytes]
    size: tuple[int, int]


def build_images(source: Path, options: BuildOptions, image_size: int | None = None) -> BuildReport:
    """Build an image data set; the sub-folders of ``source``, sorted, become classes 0, 1, ...

    Where the sub-folders are called ``train`` and ``val``, they are the splits and the classes are below them.

    Args:
        source: folder of images, at any depth.
        options: see :class:`BuildOptions`.
        image_size: crop to the central square and resize to this many pixels a side; None keeps the images.

    Raises:
        DataError: there are no images, too many are unreadable, or the output is not empty.
    """
    files, others = _image_files(source)
    pictures, classes = _labelled(source, files, options.val_fraction)
    remarks = [*([] if classes else _why_unlabelled(source, files)), *map(_left_out, others)]
    return _build(pictures, options, image_size, classes=classes, remarks=remarks)


def build_image_text(source: Path, options: BuildOptions, image_size: int | None = None) -> BuildReport:
    """Build a data set of captioned images: beside each image ``x.png`` stands its caption ``x.txt``.

    An image without a caption counts as unreadable, and so does a caption without an image. See
    :func:`build_images` for arguments and errors.
    """
    files, others = _image_files(source)
    names = [file.relative_to(source).as_posix() for file in files]
    splits = assign_splits(names, options.val_fraction)
    pictures = [
        Picture(file=file, name=name, split=split, caption=file.with_suffix(".txt"))
        for file, name, split in zip(files, names, splits, strict=True)
    ]
    captioned = {file.with_suffix("") for file in files}
    strays = [file for file in others if file.suffix == ".txt" and file.with_suffix("") not in captioned]
    remarks = [_left_out(file) for file in others if file.suffix != ".txt"]
    return _build(pictures, options, image_size, strays=strays, remarks=remarks)


def encode_image(data: bytes, image_size: int | None) -> EncodedImage:
    """Decode an image wholly, to know that it can be, and return the bytes to store.

    Raises:
        ValueError: it cannot be decoded.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError as error:  # its own words quote an object's address
        raise ValueError("not an image" if data else "the file is empty") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable image ({error})") from error
    extension = KEPT_FORMATS.get(image.format or "")
    if image.mode.startswith("I"):  # 16-bit grey: the high byte, where Pillow's conversion would clip
        image, extension = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)), None
    grey = image.mode in GREY_MODES
    if image_size is None and extension is not None:
        return EncodedImage(extension, data, (image.height, image.width), 1 if grey else 3)
    upright = ImageOps.exif_transpose(image).convert("L" if grey else "RGB")
    if image_size is not None:
        upright = ImageOps.fit(upright, (image_size, image_size), Image.Resampling.LANCZOS)
    return EncodedImage("png", encode_png(upright), (upright.height, upright.width), 1 if grey else 3)


def encode_png(image: Image.Image) -> bytes:
    """Return the PNG form of an image."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _image_files(source: Path) -> tuple[list[Path], list[Path]]:
    """Return the images below a folder, and the files there that are none."""
    if not source.is_dir():
        raise DataError.of(
            "this is a file, not a folder" if source.exists() else "there is no such folder",
            where=str(source),
            fix="name a folder that holds images",
        )
    found = files_below(source)
    files = [file for file in found if file.suffix.lower() in IMAGE_SUFFIXES | FOREIGN_SUFFIXES]
    if not files:
        raise DataError.of(
            "there are no images in this folder",
            where=str(source),
            allowed=", ".join(sorted(IMAGE_SUFFIXES)),
            fix="name the folder that holds the images, at any depth",
        )
    images = set(files)
    return files, [file for file in found if file not in images]


def _left_out(file: Path) -> str:
    return f"{file}: no image by its name, left out"


def _labelled(source: Path, files: list[Path], val_fraction: float) -> tuple[list[Picture], list[str]]:
    """Give each image its split, and its class where all images are in sub-folders."""
    parts = [file.relative_to(source).parts for file in files]
    presplit = val_fraction > 0 and {part[0] if len(part) > 1 else "" for part in parts} == {TRAIN, VAL}
    if presplit:
        parts = [part[1:] for part in parts]
    labelled = all(len(part) > 1 for part in parts)
    classes = sorted({part[0] for part in parts}) if labelled else []
    number = {name: index for index, name in enumerate(classes)}
    names = [file.relative_to(source).as_posix() for file in files]
    splits = [name.partition("/")[0] for name in names] if presplit else assign_splits(names, val_fraction)
    pictures = [
        Picture(file=file, name=name, split=split, label=number[part[0]] if labelled else None)
        for file, name, split, part in zip(files, names, splits, parts, strict=True)
    ]
    return pictures, classes


def _why_unlabelled(source: Path, files: list[Path]) -> list[str]:
    """Say which images stand in the way of labels where most users would expect some: there are sub-folders."""
    outside = [file for file in files if file.parent == source]
    if len(outside) == len(files):
        return []
    others = f" and {len(outside) - 1} more images" if len(outside) > 1 else ""
    folders = len({file.relative_to(source).parts[0] for file in files} - {file.name for file in outside})
    where = f"{outside[0]}{others} outside the {folders} sub-folders" if outside else "images directly in train or val"
    return [f"no labels: sub-folders become classes only where all images are in one, and there is {where}"]


def _build(
    pictures: list[Picture],
    options: BuildOptions,
    image_size: int | None,
    *,
    classes: Sequence[str] = (),
    strays: Sequence[Path] = (),
    remarks: Sequence[str] = (),
) -> BuildReport:
    check_output(options.out)
    captioned = pictures[0].caption is not None
    sizes: set[tuple[int, int]] = set()
    channels: set[int] = set()
    keys = KeyMaker()

    def load(picture: Picture) -> _Loaded | ValueError:
        try:
            image = _encode_file(picture.file, image_size)
            members = {image.extension: image.data}
            if picture.label is not None:
                members["cls"] = str(picture.label).encode()
            if picture.caption is not None:
                members["txt"] = _caption(picture.caption)
        except (OSError, ValueError) as error:
            return ValueError(str(error))
        sizes.add(image.size)
        channels.add(image.channels)
        return _Loaded(members, image.size)

    with building(options) as work:
        for file in strays:
            work.rejects.add(file, "a caption without an image beside it")
        for number, (picture, loaded) in enumerate(ordered_map(load, pictures)):
            _write(work, picture, loaded, keys)
            options.progress(number + 1, len(pictures))
        return work.finish(
            "image-text" if captioned else "images",
            classes=classes,
            tokenizer=ByteTokenizer().description() if captioned else None,
            image_size=next(iter(sizes)) if len(sizes) == 1 else None,
            channels=max(channels, default=None),
            remarks=remarks,
        )


def _encode_file(file: Path, image_size: int | None) -> EncodedImage:
    suffix = file.suffix.lower()
    try:
        return encode_image(file.read_bytes(), image_size)
    except ValueError as error:
        if suffix not in FOREIGN_SUFFIXES:
            raise
        raise ValueError(f"{error} that can be read here; convert it from {suffix} to .png or .jpg") from error


def _write(work: Building, picture: Picture, loaded: _Loaded | ValueError, keys: KeyMaker) -> None:
    if isinstance(loaded, ValueError):
        work.rejects.add(picture.file, str(loaded))
    else:
        key = keys.key(picture.name)
        work.writers[picture.split].add(key, loaded.members, label=picture.label, size=loaded.size)


def _caption(file: Path) -> bytes:
    if not file.exists():
        raise ValueError(f"it has no caption ({file.name})")
    return decode_text(file.read_bytes()).strip().encode()


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Yield (item, function(item)) in the order of the items, computed by one thread a core a little ahead.

    Pillow works outside the interpreter's lock, so threads are enough.
    """
    threads = len(os.sched_getaffinity(0))
    ahead: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            ahead.append((item, pool.submit(function, item)))
            if len(ahead) > 8 * threads:
                first, future = ahead.popleft()
                yield first, future.result()
        while ahead:
            first, future = ahead.popleft()
            yield first, future.result()
