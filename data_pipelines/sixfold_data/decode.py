"""From a member's bytes to arrays, by extension."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from sixfold_data.png import DamagedPng, decode_plain_pngs
from sixfold_data.tokenizers import STORAGE_DTYPES

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")

_MODES = {1: "L", 3: "RGB"}


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


def decode_image(
    content: bytes, *, channels: int | None = None, size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "h w c"]:
    """Decode an image file.

    Args:
        content: PNG, JPEG or WebP.
        channels: 1 (grey) or 3 (RGB); None keeps grey images grey and makes all others RGB.
        size: height and width; resize to cover them and crop the centre.

    Raises:
        UndecodableError: the bytes are not an image.
    """
    (decoded,) = decode_images([content], channels=channels, size=size)
    if isinstance(decoded, UndecodableError):
        raise decoded
    return decoded


def decode_images(
    contents: Sequence[bytes], *, channels: int | None = None, size: tuple[int, int] | None = None
) -> list[UInt8[np.ndarray, "h w c"] | UndecodableError]:
    """Decode like :func:`decode_image`, small PNGs together, with an error in the place of each damaged file."""
    decoded: list[np.ndarray | UndecodableError] = []
    for content, plain in zip(contents, decode_plain_pngs(contents), strict=True):
        if isinstance(plain, DamagedPng):
            decoded.append(UndecodableError(f"cannot decode the image: {plain}"))
        elif plain is not None and channels in (None, plain.shape[2]) and size in (None, plain.shape[:2]):
            decoded.append(plain)
        else:
            decoded.append(_decode_by_pillow(content, channels, size))
    return decoded


def _decode_by_pillow(
    content: bytes, channels: int | None, size: tuple[int, int] | None
) -> np.ndarray | UndecodableError:
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
        mode = _MODES[channels] if channels else ("L" if image.mode in ("1", "L", "LA") else "RGB")
        if image.mode != mode:
            image = image.convert(mode)
        if size is not None and (image.height, image.width) != size:
            image = _covering(image, *size)
        pixels = np.frombuffer(image.tobytes(), dtype=np.uint8)
    # Pillow reports damage by one of these, according to the format and the place of the damage.
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        return UndecodableError(f"cannot decode the image: {error}")
    return pixels.reshape(image.height, image.width, len(mode) if mode == "RGB" else 1)


def _covering(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize an image to cover a size, and crop the centre."""
    scale = max(height / image.height, width / image.width)
    covered = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    resized = image.resize(covered, Image.Resampling.LANCZOS)
    left, top = (covered[0] - width) // 2, (covered[1] - height) // 2
    return resized.crop((left, top, left + width, top + height))


def with_unit_range(fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return fields with their ``image`` as fp32 in [-1, 1], where it still is pixels in uint8."""
    image = fields.get("image")
    if image is None or image.dtype != torch.uint8:
        return dict(fields)
    return {**fields, "image": _to_unit_range(image)}


def to_unit_range(images: Sequence[np.ndarray] | np.ndarray) -> Float[Tensor, "n c h w"]:
    """Stack uint8 images ``[h, w, c]`` of one shape into fp32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(images) if isinstance(images, Sequence) else images)
    return _to_unit_range(stacked.permute(0, 3, 1, 2))


def _to_unit_range(pixels: Tensor) -> Tensor:
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)
