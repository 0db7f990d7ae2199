"""``sixfold tabulate``: runs side by side, each sampled in several ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(tabulate)


def tabulate(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN[@STEPS]...", help="Runs, each with numbers of steps: RUN@1,2,4.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for table.md, table.json and samples.png.")] = Path("table"),
    sampler: Annotated[str | None, typer.Option(help="Another type of sampler for all of them.")] = None,
    guidance: Annotated[
        str | None, typer.Option(metavar="[TYPE:]SCALE,...", help="Guidances to try in turn, such as 1,1.5,cfg_zero:2.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help="Samples to draw each time.", show_default="as the recipes say")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure runs side by side: quality against evaluations of the network and time, by steps and guidance.

    Example: sixfold tabulate runs/teacher@1,2,4,50 runs/student@1,2 --out comparison
    """
    from functools import partial

    from sixfold.cli.screen import print_table
    from sixfold.recipe.trained import locate_run
    from sixfold.train import tabulate as tables

    guidances = guidance.split(",") if guidance else []
    ways = [way for run in runs for way in tables.ways_of(run, locate_run, sampler=sampler, guidances=guidances)]
    lines = tables.tabulate(ways, cache=out / "cache", samples=samples, say=partial(typer.echo, err=True))
    written = tables.write_table(lines, out)
    if as_json:
        typer.echo(json.dumps([tables.as_record(line) for line in lines]))
        return
    headings, rows = tables.table(lines)
    print_table(None, headings, rows)
    typer.echo(f"written: {', '.join(str(path) for path in written)}")
