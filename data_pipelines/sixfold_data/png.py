"""Plain PNGs, many at once.

Reading a small PNG through Pillow costs several times what its pixels do: each file makes an image, a decoder and an
encoder. Here files of one size are stacked into one tall image, inflated one by one and unfiltered together. A row of
zeros before each keeps a first row that is stored as a difference from the row above as it was: a difference from 0.
"""

from __future__ import annotations

import struct
import zlib
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {0: "L", 2: "RGB"}
_PIXELS_AT_ONCE = 1 << 22
_FILTERS = 5


class DamagedPng(Exception):
    """A plain PNG's pixels cannot be read."""


class _Layout(NamedTuple):
    width: int
    height: int
    mode: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one filtered row: the filter's number and the pixels."""
        return 1 + self.width * len(self.mode)


def decode_plain_pngs(contents: Sequence[bytes]) -> list[UInt8[np.ndarray, "h w c"] | DamagedPng | None]:
    """Decode 8-bit grey and RGB PNGs without interlace or transparency; None stands for any other file."""
    decoded: list[np.ndarray | DamagedPng | None] = [None] * len(contents)
    slots: dict[_Layout, list[int]] = defaultdict(list)
    for slot, content in enumerate(contents):
        layout = _layout(content)
        if layout is not None:
            slots[layout].append(slot)
    for layout, here in slots.items():
        together = max(1, _PIXELS_AT_ONCE // (layout.width * layout.height))
        for start in range(0, len(here), together):
            chunk = here[start : start + together]
            for slot, pixels in zip(chunk, _decode_alike(layout, [contents[slot] for slot in chunk]), strict=True):
                decoded[slot] = pixels
    return decoded


def _layout(content: bytes) -> _Layout | None:
    """Return size and mode of a plain PNG."""
    if content[:8] != _SIGNATURE or content[12:16] != b"IHDR" or len(content) < 33:
        return None
    width, height, depth, colour, _, _, interlace = struct.unpack_from(">IIBBBBB", content, 16)
    mode = _COLOUR_TYPES.get(colour)
    if mode is None or depth != 8 or interlace or not 0 < width * height <= _PIXELS_AT_ONCE or b"tRNS" in content:
        return None  # what is larger, perhaps since its header is damaged, goes to Pillow's own check
    return _Layout(width, height, mode)


def _decode_alike(layout: _Layout, contents: Sequence[bytes]) -> list[np.ndarray | DamagedPng]:
    rows = np.zeros((len(contents), layout.height + 1, layout.row_bytes), dtype=np.uint8)
    damaged: dict[int, DamagedPng] = {}
    for number, content in enumerate(contents):
        try:
            inflated = np.frombuffer(zlib.decompress(_pixel_data(content)), dtype=np.uint8)
            rows[number, 1:] = inflated.reshape(layout.height, layout.row_bytes)
        except (zlib.error, ValueError, DamagedPng) as error:
            damaged[number] = DamagedPng(str(error))
    for number in np.flatnonzero((rows[:, :, 0] >= _FILTERS).any(1)).tolist():
        rows[number] = 0
        damaged[number] = DamagedPng("a row has an unknown filter")
    size = (layout.width, len(contents) * (layout.height + 1))
    tall = Image.frombytes(layout.mode, size, zlib.compress(rows.tobytes(), 0), "zip", layout.mode)
    pixels = np.frombuffer(tall.tobytes(), dtype=np.uint8)
    stacked = pixels.reshape(len(contents), layout.height + 1, layout.width, len(layout.mode))[:, 1:]
    return [damaged.get(number, stacked[number]) for number in range(len(contents))]


def _pixel_data(content: bytes) -> bytes:
    """Return the compressed rows: the IDAT chunks put together."""
    compressed = []
    place = 33
    while place + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        if kind == b"IDAT":
            compressed.append(content[place + 8 : place + 8 + length])
        elif kind == b"IEND":
            return compressed[0] if len(compressed) == 1 else b"".join(compressed)
        place += 12 + length
    raise DamagedPng("the image is truncated")
