"""From a member's bytes to arrays, by extension."""

from __future__ import annotations

import io
import json
import struct
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from sixfold_data.tokenizers import STORAGE_DTYPES

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")

_MAX_PLAIN_PIXELS = 1 << 26  # damaged headers claim any size; what is larger goes to Pillow's own check
_MODES = {1: "L", 3: "RGB"}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_COLOUR_TYPES = {0: "L", 2: "RGB"}


class UndecodableError(Exception):
    """A member's bytes are not what its extension says. The corrupt-sample policy acts on it; users never see it."""


def decode_member(extension: str, content: bytes) -> object:
    """Decode one member: images (to fp32 ``[channels, height, width]`` in [-1, 1]), npy, json, cls, txt or tokens.

    Raises:
        UndecodableError: the bytes do not decode, or the extension is unknown.
    """
    try:
        if extension in IMAGE_EXTENSIONS:
            return to_unit_range([decode_image(content)])[0]
        return _DECODERS[extension](content)
    except KeyError as error:
        raise UndecodableError(f"no decoder for .{extension}") from error
    except (ValueError, EOFError) as error:
        raise UndecodableError(f"cannot decode .{extension}: {error}") from error


_DECODERS: dict[str, Callable[[bytes], object]] = {
    "npy": lambda content: np.load(io.BytesIO(content), allow_pickle=False),
    "json": json.loads,
    "cls": lambda content: int(content.decode("ascii")),
    "txt": lambda content: content.decode("utf-8"),
    "u16": lambda content: np.frombuffer(content, dtype=STORAGE_DTYPES["u16"]).astype(np.int64),
    "u32": lambda content: np.frombuffer(content, dtype=STORAGE_DTYPES["u32"]).astype(np.int64),
}


def decode_image(content: bytes, *, channels: int | None = None, size: int | None = None) -> UInt8[np.ndarray, "h w c"]:
    """Decode an image file.

    Args:
        content: PNG, JPEG or WebP.
        channels: 1 (grey) or 3 (RGB); None keeps grey images grey and makes all others RGB.
        size: resize the shorter side to this many pixels and crop the centre square.

    Raises:
        UndecodableError: the bytes are not an image.
    """
    try:
        image = _open_plain_png(content) or Image.open(io.BytesIO(content))
        mode = _MODES[channels] if channels else ("L" if image.mode in ("1", "L", "LA") else "RGB")
        if image.mode != mode:
            image = image.convert(mode)
        if size is not None and image.size != (size, size):
            image = _centre_square(image, size)
        pixels = np.frombuffer(image.tobytes(), dtype=np.uint8)
    # Pillow reports damage by one of these, according to the format and the place of the damage.
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise UndecodableError(f"cannot decode the image: {error}") from error
    return pixels.reshape(image.height, image.width, len(mode) if mode == "RGB" else 1)


class _Canvas(threading.local):
    """An image that is decoded into over and over, since making one costs as much as reading it; one a thread."""

    def __init__(self) -> None:
        self._image = Image.new("L", (1, 1))

    def of(self, mode: str, size: tuple[int, int]) -> Image.Image:
        """Return the canvas, a new one where mode or size differ from the last."""
        if self._image.mode != mode or self._image.size != size:
            self._image = Image.new(mode, size)
        return self._image


_canvas = _Canvas()


def _open_plain_png(content: bytes) -> Image.Image | None:
    """Decode an 8-bit grey or RGB PNG without interlace by its pixel data alone; None for any other file.

    For small images Pillow's general reader spends most of its time around the pixels: this halves it at 32x32.
    The image is this thread's canvas, valid until the next call.
    """
    if content[:8] != _PNG_SIGNATURE or content[12:16] != b"IHDR":
        return None
    width, height, depth, colour, _, _, interlace = struct.unpack_from(">IIBBBBB", content, 16)
    mode = _PNG_COLOUR_TYPES.get(colour)
    if mode is None or depth != 8 or interlace or not 0 < width * height <= _MAX_PLAIN_PIXELS:
        return None
    compressed = []
    place = 33
    while place + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        if kind == b"IDAT":
            compressed.append(content[place + 8 : place + 8 + length])
        elif kind == b"IEND":
            canvas = _canvas.of(mode, (width, height))
            canvas.frombytes(b"".join(compressed), "zip", mode)
            return canvas
        elif kind == b"tRNS":
            return None
        place += 12 + length
    raise UndecodableError("the image is truncated")


def _centre_square(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def to_unit_range(images: Sequence[np.ndarray] | np.ndarray) -> Float[Tensor, "n c h w"]:
    """Stack uint8 images ``[h, w, c]`` of one shape into fp32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(images) if isinstance(images, Sequence) else images)
    return stacked.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)
