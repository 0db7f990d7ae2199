"""Pictures of a data set side by side, each over what it shows."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw, ImageFont

from sixfold_data.inspect import Picture

SMALLEST_CELL_PIXELS = 48
SMALLEST_CAPTIONED_CELL_PIXELS = 112
LARGEST_CELL_PIXELS = 160
_FONT_PIXELS = 10
_LINE_PIXELS = 13
_GAP_PIXELS = 4
_MOST_LINES = 8
_UNKNOWN = "\U0010ffff"  # a noncharacter: no font has it, so it looks like whatever the font lacks
_SPELLINGS = str.maketrans(
    {"ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D"}
    | {
        "ı": "i",
        "þ": "th",
        "Þ": "Th",
        "ð": "d",
        "–": "-",
        "—": "-",
        "‘": "'",
        "’": "'",
        "“": '"',
        "”": '"',
        "„": '"',
        "€": "EUR",
    }
)


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_grid(pictures: Sequence[Picture], columns: int) -> Image.Image:
    """Draw pictures with their titles wrapped below, row by row; tiny ones are enlarged by whole factors."""
    font = load_font()
    titles = [spelled(picture.title, font) or spelled(picture.key, font) for picture in pictures]
    widest = max(font.getlength(title) for title in titles)
    smallest = SMALLEST_CELL_PIXELS if widest <= SMALLEST_CELL_PIXELS else SMALLEST_CAPTIONED_CELL_PIXELS
    largest = max(max(picture.pixels.shape[:2]) for picture in pictures)
    cell = min(LARGEST_CELL_PIXELS, largest * max(1, -(-smallest // largest)))
    wrapped = [wrap(title, cell, font) for title in titles]
    row_pixels = cell + _LINE_PIXELS * max(map(len, wrapped)) + _GAP_PIXELS
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * (cell + _GAP_PIXELS), rows * row_pixels), "white")
    pen = ImageDraw.Draw(grid)
    for number, (picture, lines) in enumerate(zip(pictures, wrapped, strict=True)):
        left = number % columns * (cell + _GAP_PIXELS) + _GAP_PIXELS // 2
        top = number // columns * row_pixels + _GAP_PIXELS // 2
        grid.paste(fit(Image.fromarray(picture.pixels), cell), (left, top))
        for below, line in enumerate(lines):
            pen.text((left, top + cell + _LINE_PIXELS * below), line, fill="black", font=font)
    return grid


def fit(image: Image.Image, side: int) -> Image.Image:
    """Scale an image so that its longer side is ``side``; enlarging keeps pixels square and sharp."""
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


@functools.cache
def load_font() -> Font:
    """Return DejaVu Sans, which has most alphabets, where the system has it; else Pillow's own, which has ASCII."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", _FONT_PIXELS)
    except OSError:
        return ImageFont.load_default()


def spelled(text: str, font: Font) -> str:
    """Return a text in letters that a font has, accents dropped where it must be; "" if few of them can be drawn."""
    drawn = "".join(_spelled_letter(letter, font) for letter in text)
    return drawn if 2 * len(drawn.replace(" ", "")) >= len(text.replace(" ", "")) else ""


def _spelled_letter(letter: str, font: Font) -> str:
    if _is_drawn(letter, font):
        return letter
    plain = unicodedata.normalize("NFKD", letter.translate(_SPELLINGS))
    return "".join(part for part in plain if not unicodedata.combining(part) and _is_drawn(part, font))


@functools.lru_cache(maxsize=4096)
def _is_drawn(letter: str, font: Font) -> bool:
    try:
        return letter == " " or bytes(font.getmask(letter)) != bytes(font.getmask(_UNKNOWN))
    except UnicodeEncodeError:  # a bitmap font, which knows latin-1 alone
        return letter.isascii()


def wrap(text: str, width: int, font: Font) -> list[str]:
    """Break a text into lines of at most ``width`` pixels, between words where it can be; the longest end in dots."""
    lines = list(_lines(text, width, font))
    if len(lines) <= _MOST_LINES:
        return lines
    last = lines[_MOST_LINES - 1]
    while font.getlength(f"{last}...") > width:
        last = last[:-1]
    return [*lines[: _MOST_LINES - 1], f"{last}..."]


def _lines(text: str, width: int, font: Font) -> Iterator[str]:
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if line and font.getlength(longer) > width:
            yield line
            longer = word
        while font.getlength(longer) > width and len(longer) > 1:
            fitting = max((end for end in range(1, len(longer)) if font.getlength(longer[:end]) <= width), default=1)
            yield longer[:fitting]
            longer = longer[fitting:]
        line = longer
    if line:
        yield line
