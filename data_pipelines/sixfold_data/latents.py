"""Latents of a codec, with labels or captions, as samples that can be read by number.

A sample's member ``npy`` holds a posterior's mean and log-variance stacked along channels, ``[2 c, h, w]`` in fp16, or
codes ``[h, w]``. Moments are handed out *normalised*: each channel of the latents has mean 0 and standard deviation 1
over the training split, by the statistics that the manifest records.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sixfold.errors import DataError
from sixfold_data.config import DataConfig
from sixfold_data.images import encode_caption
from sixfold_data.index import LatentsEntry, Manifest
from sixfold_data.members import Row, Unreadable
from sixfold_data.order import EpochOrder, Places
from sixfold_data.selection import Chosen
from sixfold_data.tokenizers import make_tokenizer

MEMBER = "npy"


class LatentSource:
    """Latents: fields ``latent`` or ``codes``, ``label`` where there are classes, ``caption`` where there are texts."""

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
        assert manifest.latents is not None, "the manifest of kind latents describes them"
        self.manifest = manifest
        self.remote = members.remote
        self.order: EpochOrder = members.order(config, seed=seed, lanes=lanes)
        self._members = members
        self._entry = manifest.latents
        size = bucket or self._entry.size
        if size is None:
            raise DataError.of(
                "the latents differ in size and cannot be stacked into batches",
                where=members.store.url,
                fix="set data.buckets to the sizes they were encoded in",
            )
        self._shape, self._dtype = stored_shape(self._entry, size), stored_dtype(self._entry)
        self._header = npy_header(self._entry, size)
        self._caption_length = config.caption_length
        self._tokenizer = None if manifest.tokenizer is None else make_tokenizer(manifest.tokenizer, members.store)

    def rows(self, places: Places) -> list[Row | Unreadable]:
        """Read and decode some samples."""
        numbers = places.sample.tolist()
        stored = self._members.read((MEMBER,), places.sample)
        decoded = [self._decoded(number, content) for number, content in zip(numbers, stored, strict=True)]
        if self._tokenizer is None:
            return decoded
        texts = self._members.read(("txt",), places.sample)
        return [self._captioned(*parts) for parts in zip(numbers, decoded, texts, strict=True)]

    def fields(self, rows: Sequence[Row], places: Places) -> dict[str, Tensor]:
        """Return decoded samples as the fields of a batch."""
        arrays = np.empty((len(rows), *self._shape), dtype=self._dtype)
        for slot, row in enumerate(rows):
            arrays[slot] = row[0]
        fields: dict[str, Tensor] = {}
        if self._entry.form == "codes":
            fields["codes"] = torch.from_numpy(arrays.astype(np.int64))
        else:
            fields["latent"] = normalized_moments(torch.from_numpy(arrays.astype(np.float32)), self._entry)
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

    def _decoded(self, sample: int, content: bytes | Unreadable) -> Row | Unreadable:
        if isinstance(content, Unreadable):
            return content
        if content[: len(self._header)] != self._header:
            return self._members.unreadable(sample, f"its .npy is no array {self._shape} of {self._dtype}")
        values = np.frombuffer(content, dtype=self._dtype, offset=len(self._header))
        if values.size != np.prod(self._shape):
            return self._members.unreadable(sample, "its .npy is cut off")
        return (values.reshape(self._shape),)

    def _captioned(self, sample: int, row: Row | Unreadable, text: bytes | Unreadable) -> Row | Unreadable:
        if isinstance(row, Unreadable):
            return row
        if isinstance(text, Unreadable):
            return text
        assert self._tokenizer is not None
        try:
            return (*row, encode_caption(self._tokenizer, text, self._caption_length))
        except UnicodeDecodeError as error:
            return self._members.unreadable(sample, str(error))


def stored_shape(entry: LatentsEntry, size: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape in which a latent of some height and width is stored."""
    return (2 * entry.channels, *size) if entry.form == "moments" else size


def stored_dtype(entry: LatentsEntry) -> np.dtype[np.generic]:
    """Return the type of stored latents: moments in fp16, codes in the smallest unsigned integers."""
    if entry.form == "moments":
        return np.dtype("<f2")
    assert entry.codebook_size is not None, "codes come with the size of their codebook"
    return np.dtype("<u2" if entry.codebook_size <= 1 << 16 else "<u4")


def npy_header(entry: LatentsEntry, size: tuple[int, int]) -> bytes:
    """Return the bytes before the data in the .npy of any latent of a size, so that reading one is no parsing."""
    buffer = io.BytesIO()
    described = {
        "descr": np.lib.format.dtype_to_descr(stored_dtype(entry)),
        "fortran_order": False,
        "shape": stored_shape(entry, size),
    }
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()


def normalized_moments(moments: Float[Tensor, "n twice h w"], entry: LatentsEntry) -> Float[Tensor, "n twice h w"]:
    """Return means less the channel's mean, over its deviation, and log-variances changed by as much."""
    mean, log_variance = moments.chunk(2, dim=1)
    centre, scale = statistics_of(entry)
    return torch.cat([(mean - centre) / scale, log_variance - 2.0 * scale.log()], dim=1)


def denormalized(latents: Float[Tensor, "n c h w"], entry: LatentsEntry) -> Float[Tensor, "n c h w"]:
    """Return latents as the codec reads them."""
    centre, scale = (value.to(latents.device) for value in statistics_of(entry))
    return latents * scale + centre


def statistics_of(entry: LatentsEntry) -> tuple[Float[Tensor, "c 1 1"], Float[Tensor, "c 1 1"]]:
    """Return mean and standard deviation of each channel."""
    centre, scale = (torch.tensor(values)[:, None, None] for values in (entry.mean, entry.std))
    return centre, scale
