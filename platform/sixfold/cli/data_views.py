"""How a data set looks in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from sixfold.cli.screen import output_console, print_table

if TYPE_CHECKING:
    from rich.text import Text

    from sixfold_data.inspect import Excerpt, Picture, Summary

CLASSES_SHOWN = 20
HISTOGRAM_WIDTH = 40
LARGEST_CELL_COLUMNS = 16


def format_bytes(number: int) -> str:
    """Return a size for people: ``2.8 MiB``."""
    size, units = float(number), iter(("bytes", "KiB", "MiB", "GiB"))
    unit = next(units)
    for larger in units:
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def print_summary(summary: Summary) -> None:
    """Print counts, sizes and label histograms."""
    facts: list[str] = [summary.kind]
    if summary.image_size is not None:
        facts.append("{}x{} pixels".format(*summary.image_size))
    if summary.channels is not None:
        facts.append("grey" if summary.channels == 1 else "RGB")
    if summary.tokenizer is not None:
        facts.append(f"{summary.tokenizer} tokenizer, vocabulary {summary.vocabulary}")
    output_console().print(f"{summary.url}: {', '.join(facts)}\nfingerprint {summary.fingerprint}\n")
    rows = [
        [name, str(split.samples), str(split.tokens or "-"), str(split.shards), format_bytes(split.bytes)]
        for name, split in summary.splits.items()
    ]
    print_table(None, ["split", "samples", "tokens", "shards", "size"], rows)
    for name, split in summary.splits.items():
        if split.labels:
            most = max(split.labels.values())
            shown = list(split.labels.items())[:CLASSES_SHOWN]
            bars = [[label, str(count), "#" * round(HISTOGRAM_WIDTH * count / max(most, 1))] for label, count in shown]
            if len(split.labels) > CLASSES_SHOWN:
                bars.append(["...", "", f"{len(split.labels) - CLASSES_SHOWN} classes more (--json lists all)"])
            output_console().print()
            print_table(f"labels of {name}", ["class", "samples", ""], bars)


def print_pictures(pictures: Sequence[Picture], columns: int) -> None:
    """Print pictures in colour, two pixels a character, as many in a row as fit; nothing where there is no terminal."""
    from PIL import Image

    from sixfold_data.contact_sheet import fit

    console = output_console()
    if not console.is_terminal:
        return
    largest = max(max(picture.pixels.shape[:2]) for picture in pictures)
    width = min(LARGEST_CELL_COLUMNS, largest)
    in_row = max(1, min(columns, console.width // (width + 1)))
    for first in range(0, len(pictures), in_row):
        row = pictures[first : first + in_row]
        console.print(_picture_row([fit(Image.fromarray(p.pixels), width) for p in row], width))
        console.print(" ".join(picture.title[:width].ljust(width) for picture in row))


def print_captions(pictures: Sequence[Picture]) -> None:
    """List the pictures by key with what each shows; nothing where they show nothing that is known."""
    if any(picture.caption is not None for picture in pictures):
        output_console().print()
        rows = [[picture.key, "-" if picture.caption is None else picture.caption] for picture in pictures]
        print_table(None, ["key", "shows"], rows)


def print_texts(split: str, excerpts: Sequence[Excerpt]) -> None:
    """Print the beginnings of documents, each below its key."""
    for excerpt in excerpts:
        typer.echo(f"\n{split}, {excerpt.key}:\n{excerpt.text}")


def _picture_row(images: Sequence[object], width: int) -> Text:
    """Return one row of pictures as half-block characters: the upper pixel in the foreground, the lower behind it."""
    import numpy as np
    from rich.text import Text

    canvas = np.zeros((width + width % 2, (width + 1) * len(images) - 1, 3), dtype=np.uint8)
    for number, image in enumerate(images):
        pixels = np.asarray(image)
        left = number * (width + 1)
        canvas[: pixels.shape[0], left : left + pixels.shape[1]] = pixels
    text = Text()
    for upper, lower in zip(canvas[0::2], canvas[1::2], strict=True):
        for top, bottom in zip(upper.tolist(), lower.tolist(), strict=True):
            text.append("▀", style="rgb({},{},{}) on rgb({},{},{})".format(*top, *bottom))
        text.append("\n")
    return text
