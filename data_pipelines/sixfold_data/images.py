"""Images, with labels or captions, as samples that can be read by number."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from sixfold.errors import DataError
from sixfold_data.config import DataConfig
from sixfold_data.decode import IMAGE_EXTENSIONS, UndecodableError, decode_images
from sixfold_data.index import Manifest
from sixfold_data.members import Row, Unreadable
from sixfold_data.order import EpochOrder, Places
from sixfold_data.selection import Chosen
from sixfold_data.tokenizers import Tokenizer, make_tokenizer

logger = logging.getLogger(__name__)

_CAPTION_SHOWN = 200


class ImageSource:
    """Images: fields ``image`` in [-1, 1], ``label`` where the data set has classes, ``caption`` where it has texts."""

    def __init__(
        self,
        config: DataConfig,
        manifest: Manifest,
        members: Chosen,
        *,
        bucket: tuple[int, int] | None,
        seed: int | None,
        lanes: int,
    ) -> None:
        self.manifest = manifest
        self.remote = members.remote
        self.order: EpochOrder = members.order(config, seed=seed, lanes=lanes)
        self._members = members
        self._resize = (config.image_size, config.image_size) if config.image_size is not None else bucket
        size = self._resize or stored_image_size(manifest, members.store.url)
        height, width, channels = self._shape = (*size, manifest.channels or 3)
        self._caption_length = config.caption_length
        self._tokenizer = None if manifest.tokenizer is None else make_tokenizer(manifest.tokenizer, members.store)
        decoded_bytes = members.split_samples * height * width * channels
        fits = self._tokenizer is None and decoded_bytes <= config.keep_decoded_bytes
        self._kept: dict[int, Row] | None = {} if fits else None

    def rows(self, places: Places) -> list[Row | Unreadable]:
        """Read and decode some samples."""
        if self._kept is None:
            return self._decoded(places.sample)
        numbers = places.sample.tolist()
        missing = [slot for slot, number in enumerate(numbers) if number not in self._kept]
        rows: list[Row | Unreadable] = [self._kept.get(number, ()) for number in numbers]
        for slot, row in zip(missing, self._decoded(places.sample[missing]), strict=True):
            rows[slot] = row
            if not isinstance(row, Unreadable):
                self._kept[numbers[slot]] = row
        return rows

    def fields(self, rows: Sequence[Row], places: Places) -> dict[str, Tensor]:
        """Return decoded samples as the fields of a batch."""
        pixels = np.empty((len(rows), *self._shape), dtype=np.uint8)
        for slot, row in enumerate(rows):
            pixels[slot] = row[0]
        fields = {"image": torch.from_numpy(pixels).permute(0, 3, 1, 2)}
        labels = self._members.labels(places.sample)
        if self.manifest.classes and labels is not None:
            fields["label"] = torch.from_numpy(labels)
        if self._tokenizer is not None:
            captions = [row[1] for row in rows] or [np.empty((0, self._caption_length), dtype=np.int64)]
            fields["caption"] = torch.from_numpy(np.concatenate([np.atleast_2d(caption) for caption in captions]))
        return fields

    def prefetch(self, places: Places) -> None:
        """Begin to bring the shards of some samples near."""
        self._members.prefetch(places.sample)

    def _decoded(self, samples: np.ndarray) -> list[Row | Unreadable]:
        numbers = samples.tolist()
        images = self._members.read(IMAGE_EXTENSIONS, samples)
        texts = [None] * len(numbers) if self._tokenizer is None else self._members.read(("txt",), samples)
        readable = [image for image in images if not isinstance(image, Unreadable)]
        pixels = iter(decode_images(readable, channels=self._shape[2], size=self._resize))
        decoded = [image if isinstance(image, Unreadable) else next(pixels) for image in images]
        return [self._row(sample, image, text) for sample, image, text in zip(numbers, decoded, texts, strict=True)]

    def _row(
        self, sample: int, pixels: np.ndarray | UndecodableError | Unreadable, text: bytes | Unreadable | None
    ) -> Row | Unreadable:
        if isinstance(pixels, Unreadable):
            return pixels
        if isinstance(text, Unreadable):
            return text
        if isinstance(pixels, UndecodableError):
            return self._members.unreadable(sample, str(pixels))
        if pixels.shape != self._shape:
            found, expected = ("x".join(map(str, shape)) for shape in (pixels.shape, self._shape))
            return self._members.unreadable(sample, f"the image is {found}, not {expected}")
        try:
            return (pixels,) if text is None else (pixels, self._caption(text))
        except UnicodeDecodeError as error:
            return self._members.unreadable(sample, str(error))

    def _caption(self, text: bytes) -> np.ndarray:
        assert self._tokenizer is not None
        return encode_caption(self._tokenizer, text, self._caption_length)


def encode_caption(tokenizer: Tokenizer, text: bytes, length: int) -> Int64[np.ndarray, " length"]:
    """Return a caption's tokens, cut to leave room for one end of text and padded with it.

    The first one to be cut is named in a warning, once a process.

    Raises:
        UnicodeDecodeError: the text is not UTF-8.
    """
    tokens = np.full(length, tokenizer.end_of_text, dtype=np.int64)
    caption = text.decode("utf-8").strip()
    encoded = tokenizer.encode(caption)
    if len(encoded) >= length:
        _warn_of_cut(length, len(encoded), caption)
    kept = encoded[: length - 1]
    tokens[: len(kept)] = kept
    return tokens


_cut_lengths: set[int] = set()


def _warn_of_cut(length: int, tokens: int, caption: str) -> None:
    if length not in _cut_lengths:
        _cut_lengths.add(length)
        logger.warning(
            "captions are cut to %d tokens (data.caption_length, less one for the end); the first longer has %d: %r",
            length - 1,
            tokens,
            caption[:_CAPTION_SHOWN],
        )


def stored_image_size(manifest: Manifest, where: str) -> tuple[int, int]:
    """Return height and width of every stored image.

    Raises:
        DataError: images differ in size.
    """
    if manifest.image_size is None:
        raise DataError.of(
            "the images differ in size and cannot be stacked into batches",
            where=where,
            fix="set data.image_size, to resize and crop them when they are read, or data.buckets for several sizes",
        )
    return manifest.image_size
