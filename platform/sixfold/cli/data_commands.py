"""``sixfold data``: build, index, inspect and verify data sets, and build the demo data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sixfold.cli.data_views import format_bytes

if TYPE_CHECKING:
    from sixfold.errors import Fault
    from sixfold_data.build import BuildReport
    from sixfold_data.inspect import Summary

MIB = 2**20
REMARKS_SHOWN = 20
PICTURES_SHOWN = 32
DOCUMENTS_SHOWN = 3

SourceArgument = Annotated[str, typer.Argument(help="Folder or URL of the data set.", show_default=False)]
OutOption = Annotated[
    Path, typer.Option("--out", help="Folder to make; must not exist or be empty.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
ValFractionOption = Annotated[
    float, typer.Option(min=0.0, max=0.99, help="Share held out as split val; 0 makes no val split.")
]
ShardSizeOption = Annotated[int, typer.Option(min=1, help="Size of a shard in MiB.")]


class BuildKind(StrEnum):
    """What a build makes samples of."""

    TEXT = "text"
    IMAGES = "images"
    IMAGE_TEXT = "image-text"


class DemoName(StrEnum):
    """Demo data sets."""

    DIGITS = "digits"
    STDLIB = "stdlib"
    SCENES = "scenes"


def register(app: typer.Typer) -> None:
    """Add ``data`` and its commands to the app."""
    from sixfold.cli.encode_command import encode, encode_text

    data = typer.Typer(
        help="Build, index, inspect and verify data sets.",
        epilog="Start with: sixfold data build images PHOTOS --out data/photos",
        no_args_is_help=True,
    )
    data.command(epilog="Example: sixfold data build text book.txt --out data/book --tokenizer characters")(build)
    data.command(
        epilog="Example: sixfold data index data/foreign --split 'train=part-0*.tar' --split 'val=part-1*.tar'"
    )(index)
    data.command(epilog="Example: sixfold data inspect data/digits --out grid.png")(inspect)
    data.command(epilog="Example: sixfold data verify data/digits --json")(verify)
    data.command(epilog="Example: sixfold data demo digits --out data/digits")(demo)
    data.command(epilog="Example: sixfold data encode runs/codec/kl-smoke/ID data/scenes --out data/scenes-latents")(
        encode
    )
    data.command(epilog="Example: sixfold data encode-text flow/mmdit-2b data/latents --out data/latents-with-text")(
        encode_text
    )
    app.add_typer(data, name="data")


def build(
    kind: Annotated[BuildKind, typer.Argument(help="What the samples are.", show_default=False)],
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="Text file or folder; image folder (class sub-folders become labels); images with .txt captions.",
            show_default=False,
        ),
    ],
    *,
    out: OutOption,
    val_fraction: ValFractionOption = 0.1,
    shard_size: ShardSizeOption = 256,
    tokenizer: Annotated[
        str, typer.Option(metavar="NAME|PATH", help="For text: bytes, characters, or a tokenizer.json.")
    ] = "bytes",
    end_of_text: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN", help="Token of a tokenizer.json that ends a document.", show_default="known ones"
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Crop images to the central square of this many pixels.", show_default="keep"),
    ] = None,
    corrupt_budget: Annotated[int, typer.Option(min=0, help="Unreadable files passed over before giving up.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Turn your own files into shards with train and val splits and an index."""
    from sixfold_data.build import BuildOptions

    with progress("files") as told:
        options = BuildOptions(
            out=out,
            val_fraction=val_fraction,
            shard_bytes=shard_size * MIB,
            corrupt_budget=corrupt_budget,
            progress=told,
        )
        if kind is BuildKind.TEXT:
            from sixfold_data.build_text import build_text

            report = build_text(source, options, tokenizer, end_of_text=end_of_text)
        else:
            from sixfold_data.build_images import build_image_text, build_images

            make = build_images if kind is BuildKind.IMAGES else build_image_text
            report = make(source, options, image_size)
    print_build(report, as_json)


def demo(
    context: typer.Context,
    name: Annotated[DemoName, typer.Argument(help="Which data.", show_default=False)],
    *,
    out: OutOption,
    max_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of source text (stdlib).")] = 4_000_000,
    samples: Annotated[int, typer.Option(min=2, help="Pictures to draw, all splits together (scenes).")] = 10_000,
    image_size: Annotated[int, typer.Option(help="Pixels a side, 16 or 32 (scenes).")] = 32,
    as_json: JsonOption = False,
) -> None:
    """Build data that need no download: scikit-learn's digits, Python's own sources, or drawn scenes with captions."""
    from sixfold.errors import UserError
    from sixfold_data.build import BuildOptions
    from sixfold_data.demo import build_digits, build_stdlib
    from sixfold_data.scenes import build_scenes

    taken = {DemoName.DIGITS: (), DemoName.STDLIB: ("--max-bytes",), DemoName.SCENES: ("--samples", "--image-size")}
    for option, parameter in (("--max-bytes", "max_bytes"), ("--samples", "samples"), ("--image-size", "image_size")):
        source = context.get_parameter_source(parameter)
        if source is not None and source.name == "COMMANDLINE" and option not in taken[name]:
            raise UserError.of(
                f"{name} has no {option}",
                where=option,
                allowed=", ".join(taken[name]) or "no option but --out and --json",
                fix="leave it out",
            )
    with progress("samples") as told:
        options = BuildOptions(out=out, progress=told)
        match name:
            case DemoName.DIGITS:
                report = build_digits(options)
            case DemoName.STDLIB:
                report = build_stdlib(options, max_bytes)
            case DemoName.SCENES:
                report = build_scenes(options, samples, image_size)
    print_build(report, as_json)


def index(
    source: SourceArgument,
    *,
    split: Annotated[
        list[str] | None,
        typer.Option(
            help="Which shards are a split, as NAME=PATTERN; may be repeated.", show_default="by folder or file name"
        ),
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="File with one class name a line, in label order.", show_default="numbers")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Index WebDataset tars that were made elsewhere; the tars stay as they are, the index is written beside them."""
    from sixfold_data.indexing import index_shards
    from sixfold_data.store import open_store

    with progress("shards") as told:
        report = index_shards(open_store(source), splits=_patterns(split), classes=_class_names(classes), progress=told)
    if as_json:
        _print_json(report)
        return
    for name, samples in report.samples.items():
        typer.echo(f"{name}: {samples} samples in {report.shards[name]} shards")
    typer.echo(f"{report.kind}, {len(report.classes)} classes, fingerprint {report.fingerprint[:16]}")
    if report.replaced_fingerprint not in (None, report.fingerprint):
        typer.echo(
            f"the former index had fingerprint {str(report.replaced_fingerprint)[:16]}; its runs cannot resume here"
        )
    _print_faults("remarks", report.remarks)


def inspect(
    source: SourceArgument,
    *,
    split: Annotated[str, typer.Option(help="Split to show samples of.")] = "train",
    count: Annotated[
        int | None, typer.Option(min=1, help="How many samples to show.", show_default="32 pictures, 3 documents")
    ] = None,
    columns: Annotated[int, typer.Option(min=1, help="Pictures in a row.")] = 8,
    characters: Annotated[int, typer.Option(min=1, help="How much of each document.")] = 600,
    out: Annotated[Path | None, typer.Option("--out", help="Write the picture grid to this PNG file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a data set holds: counts, sizes, labels, and pictures with their captions, or documents."""
    from sixfold.cli.data_views import print_captions, print_pictures, print_summary, print_texts
    from sixfold.errors import DataError
    from sixfold_data.contact_sheet import draw_grid
    from sixfold_data.index import read_manifest
    from sixfold_data.inspect import read_pictures, read_texts, summarise
    from sixfold_data.store import open_store

    store = open_store(source)
    manifest = read_manifest(store)
    summary = summarise(store, manifest)
    if manifest.kind == "text" and out is not None:
        raise DataError.of("a text data set has no pictures to write", where="--out", fix="leave --out away")
    if not as_json:
        print_summary(summary)
    if manifest.kind == "text":
        excerpts = read_texts(store, manifest, split, count or DOCUMENTS_SHOWN, characters)
        if as_json:
            _print_inspected(summary, split, [dataclasses.asdict(excerpt) for excerpt in excerpts])
        else:
            print_texts(split, excerpts)
        return
    pictures = read_pictures(store, manifest, split, count or PICTURES_SHOWN)
    if out is not None:
        draw_grid(pictures, columns).save(out, "PNG")
    if as_json:
        _print_inspected(summary, split, [{"key": picture.key, "caption": picture.caption} for picture in pictures])
        return
    print_pictures(pictures, columns)
    print_captions(pictures)
    if out is not None:
        typer.echo(f"wrote {len(pictures)} pictures to {out}")


def _print_inspected(summary: Summary, split: str, shown: list[dict[str, Any]]) -> None:
    typer.echo(json.dumps(dataclasses.asdict(summary) | {"shown": {"split": split, "samples": shown}}, indent=2))


def verify(source: SourceArgument, as_json: JsonOption = False) -> None:
    """Check every byte of a data set against its index; exit code 2 and a list where it is damaged."""
    from sixfold.errors import DataError
    from sixfold_data.store import open_store
    from sixfold_data.verify import verify as check

    with progress("bytes") as told:
        report = check(open_store(source), told)
    if as_json:
        _print_json(report)
    elif not report.faults:
        typer.echo(f"whole: {report.samples} samples in {report.shards} shards, {format_bytes(report.bytes)}")
    if report.faults and as_json:
        raise typer.Exit(DataError.exit_code)
    if report.faults:
        raise DataError(*report.faults)


@contextmanager
def progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (done, in all) that draws a bar on a terminal and else prints a line at every tenth."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _LinewiseProgress(unit)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _LinewiseProgress:
    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._tenths = 0

    def __call__(self, done: int, total: int) -> None:
        tenths = 10 * done // max(total, 1)
        if tenths > self._tenths:
            self._tenths = tenths
            typer.echo(f"{self._unit}: {done} of {total}", err=True)


def _patterns(splits: list[str] | None) -> dict[str, str] | None:
    from sixfold.errors import DataError

    if not splits:
        return None
    pairs = [item.partition("=") for item in splits]
    for name, equals, pattern in pairs:
        if not (name and equals and pattern):
            raise DataError.of(
                f"{name + equals + pattern!r} is no NAME=PATTERN", where="--split", allowed="val=part-1*.tar"
            )
    return {name: pattern for name, _, pattern in pairs}


def _class_names(file: Path | None) -> tuple[str, ...]:
    from sixfold.errors import DataError

    if file is None:
        return ()
    try:
        return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise DataError.of(f"the class names cannot be read: {error}", where=str(file)) from error


def print_build(report: BuildReport, as_json: bool) -> None:
    """Print what a build made."""
    if as_json:
        _print_json(report)
        return
    for split, samples in report.samples.items():
        tokens = f", {report.tokens[split]} tokens" if split in report.tokens else ""
        typer.echo(f"{split}: {samples} samples{tokens}, {format_bytes(report.bytes[split])}")
    classes = f", {len(report.classes)} classes" if report.classes else ""
    typer.echo(f"built {report.kind}{classes} in {report.out}, fingerprint {report.fingerprint[:16]}")
    for remark in report.remarks[:REMARKS_SHOWN]:
        typer.echo(remark, err=True)
    if len(report.remarks) > REMARKS_SHOWN:
        typer.echo(f"and {len(report.remarks) - REMARKS_SHOWN} more remarks (--json lists all)", err=True)
    _print_faults("files that could not be read", report.unreadable)


def _print_faults(heading: str, faults: Any) -> None:
    shown: list[Fault] = list(faults[:REMARKS_SHOWN])
    if shown:
        typer.echo(f"{len(faults)} {heading}:", err=True)
    for fault in shown:
        typer.echo(f"  {fault.where}: {fault.what}", err=True)
    if len(faults) > len(shown):
        typer.echo(f"  and {len(faults) - len(shown)} more (--json lists all)", err=True)


def _print_json(report: Any) -> None:
    typer.echo(json.dumps(dataclasses.asdict(report), indent=2))
