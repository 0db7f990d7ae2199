"""Pictures of samples, with a caption under each."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

_SMALLEST_TILE_PIXELS = 64
_CAPTION_PIXELS = 14
_GAP_PIXELS = 4
_LETTER_PIXELS = 6
_LINE_GAP_PIXELS = 1


def to_picture(image: Float[Tensor, "channels height width"]) -> Image.Image:
    """Turn an image in [-1, 1] with one (grey) or three channels into a picture."""
    pixels = ((image.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels[:, :, 0], mode="L") if pixels.shape[2] == 1 else Image.fromarray(pixels[:, :, :3])


def sample_grid(
    images: Float[Tensor, "n channels height width"] | Sequence[Float[Tensor, "_ _ _"]],
    captions: Sequence[str] | None = None,
    *,
    columns: int = 10,
) -> Image.Image:
    """Lay images out in rows of ``columns``, small ones enlarged without smoothing, each over its caption.

    Images of several sizes get tiles of the largest one's shape.
    """
    count = len(images)
    height, width = (max(image.shape[dim] for image in images) for dim in (-2, -1))
    columns = max(1, min(columns, count))
    enlarge = max(1, -(-_SMALLEST_TILE_PIXELS // max(height, width)))
    tile_width, tile_height = width * enlarge, height * enlarge
    below = [_wrapped(caption, tile_width) for caption in captions] if captions else []
    row_height = tile_height + _GAP_PIXELS + _CAPTION_PIXELS * max((text.count("\n") + 1 for text in below), default=0)
    rows = -(-count // columns)
    sheet = Image.new(
        "RGB", (columns * (tile_width + _GAP_PIXELS) + _GAP_PIXELS, rows * row_height + _GAP_PIXELS), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        left = _GAP_PIXELS + index % columns * (tile_width + _GAP_PIXELS)
        top = _GAP_PIXELS + index // columns * row_height
        sheet.paste(to_picture(image).resize((tile_width, tile_height), Image.Resampling.NEAREST), (left, top))
        if captions:
            middle = (left + tile_width // 2, top + tile_height)
            draw.multiline_text(
                middle, below[index], fill="black", anchor="ma", align="center", spacing=_LINE_GAP_PIXELS
            )
    return sheet


def _wrapped(caption: str, width: int) -> str:
    """Break a caption into lines that fit a tile, as near as its letters' mean width tells."""
    return "\n".join(textwrap.wrap(caption, max(1, width // _LETTER_PIXELS))) or caption


def write_sample_grid(
    path: Path,
    images: Float[Tensor, "n channels height width"],
    captions: Sequence[str] | None = None,
    *,
    columns: int = 10,
) -> None:
    """Write :func:`sample_grid` as a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sample_grid(images, captions, columns=columns).save(path, format="PNG")
