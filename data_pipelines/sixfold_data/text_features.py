"""Features of captions that frozen text encoders made beforehand, read with the samples that they belong to.

A sample's member ``text-<encoder>`` holds what one encoder makes of its caption: text tokens and then pooled features,
one after another as plain numbers, in fp32 or bf16 as the encoder computes them. What it makes of no caption is the
same for all samples, and lies once in a file of the data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sixfold_data.index import Manifest, TextFeaturesEntry
from sixfold_data.members import Row, Unreadable
from sixfold_data.order import EpochOrder, Places
from sixfold_data.selection import Chosen

if TYPE_CHECKING:
    from sixfold_data.sources import Source

DTYPES: dict[Literal["fp32", "bf16"], torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def member_of(encoder: str) -> str:
    """Name the member that holds an encoder's features."""
    return f"text-{encoder}"


def field_of(encoder: str) -> str:
    """Name the batch field of an encoder's features, ``[n, values]``."""
    return f"text/{encoder}"


def decode_features(content: bytes, entry: TextFeaturesEntry) -> Float[Tensor, " values"]:
    """Return the numbers that a member or a file of null features holds.

    Raises:
        ValueError: they are not as many as the manifest says.
    """
    dtype = DTYPES[entry.dtype]
    if len(content) != entry.values * dtype.itemsize:
        raise ValueError(f"{len(content)} bytes are not {entry.values} numbers in {entry.dtype}")
    return torch.frombuffer(bytearray(content), dtype=dtype)


class WithText:
    """A source whose samples come with the features of their captions."""

    def __init__(self, source: Source, members: Chosen) -> None:
        self._source, self._members = source, members
        self._entries: Mapping[str, TextFeaturesEntry] = source.manifest.text
        self.order: EpochOrder = source.order
        self.manifest: Manifest = source.manifest
        self.remote = source.remote

    def rows(self, places: Places) -> list[Row | Unreadable]:
        """Read and decode some samples; a row ends with one array of bytes for each encoder."""
        columns = [self._members.read((member_of(encoder),), places.sample) for encoder in self._entries]
        samples = zip(places.sample.tolist(), self._source.rows(places), *columns, strict=True)
        return [self._joined(number, row, parts) for number, row, *parts in samples]

    def fields(self, rows: Sequence[Row], places: Places) -> dict[str, Tensor]:
        """Return decoded samples as the fields of a batch."""
        own = len(self._entries)
        fields = self._source.fields([row[:-own] for row in rows], places)
        for column, (encoder, entry) in enumerate(self._entries.items(), start=-own):
            content = b"".join(row[column].tobytes() for row in rows)
            numbers = torch.frombuffer(bytearray(content), dtype=DTYPES[entry.dtype]) if rows else torch.empty(0)
            fields[field_of(encoder)] = numbers.reshape(len(rows), entry.values)
        return fields

    def prefetch(self, places: Places) -> None:
        """Begin to bring the shards of some samples near."""
        self._source.prefetch(places)

    def _joined(self, number: int, row: Row | Unreadable, parts: Sequence[bytes | Unreadable]) -> Row | Unreadable:
        if isinstance(row, Unreadable):
            return row
        arrays = []
        for part, entry in zip(parts, self._entries.values(), strict=True):
            if isinstance(part, Unreadable):
                return part
            try:
                if not torch.isfinite(decode_features(part, entry)).all():
                    return self._members.unreadable(number, "features of its caption are not finite")
            except ValueError as error:
                return self._members.unreadable(number, f"features of its caption: {error}")
            arrays.append(np.frombuffer(part, dtype=np.uint8))
        return (*row, *arrays)
