"""``sixfold evaluate`` and ``ema``: what a trained run is worth, and averages of its weights made afterwards."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder or a run id.", show_default=False)]
LengthOption = Annotated[
    float | None,
    typer.Option(
        "--ema-length",
        min=0.001,
        max=0.28,
        help="On an average of this length, reconstructed from snapshots.",
        show_default="as the recipe keeps",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command(epilog="Example: sixfold evaluate runs/smoke/dit --samples 5000 --json")(evaluate)
    app.command(epilog="Example: sixfold ema runs/smoke/dit --length 0.08 --out dit-ema.safetensors")(ema)


def evaluate(
    run: RunArgument,
    samples: Annotated[
        int | None, typer.Option(min=2, help="Samples to draw.", show_default="as the recipe says")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="What to measure.", show_default="as the recipe says")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE|{type: ...}",
            help="Feature space: a type, or its settings as in evaluation.features.",
            show_default="as the recipe says",
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Data set that samples are compared with.", show_default="as the recipe says")
    ] = None,
    length: LengthOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a run's newest checkpoint as its recipe's evaluation section says, on averaged weights if it has them.

    With --metrics, --features or --reference, measure that instead.
    """
    from sixfold.cli.screen import print_table
    from sixfold.evaluation.report import HEADINGS, logged, table_rows
    from sixfold.tracking.runs import find_run
    from sixfold.train.inference import evaluate_run

    folder = find_run(run)
    changes = {
        "metrics": None if metrics is None else f"[{metrics}]",
        "features": features,
        "reference": None if reference is None else json.dumps(reference),
    }
    overrides = [f"evaluation.{key}={value}" for key, value in changes.items() if value is not None]
    measured = evaluate_run(folder, samples=samples, length=length, overrides=overrides)
    if as_json:
        estimates = [asdict(estimate) for estimate in measured.estimates]
        typer.echo(json.dumps({"step": measured.step, **logged(measured.estimates), "estimates": estimates}))
        return
    print_table(f"{folder} after step {measured.step}", HEADINGS, table_rows(measured.estimates))


def ema(
    run: RunArgument,
    length: Annotated[
        float,
        typer.Option(min=0.001, max=0.28, help="Standard deviation of the average's weights, relative to training."),
    ],
    step: Annotated[int | None, typer.Option(min=1, help="Snapshot to end at.", show_default="the newest")] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; must not exist.", show_default="ema/ in the run folder")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Reconstruct a moving average of any length from the snapshots that train.ema.type=power keeps."""
    from sixfold.cli.screen import print_table
    from sixfold.tracking.runs import find_run
    from sixfold.train.reconstruction import write_reconstructed

    written = write_reconstructed(find_run(run), length=length, step=step, out=out)
    rows = [
        {
            "role": made.role,
            "step": made.newest.step,
            "length": length,
            "snapshots": made.snapshots,
            "profile_error": made.error,
            "file": str(path),
        }
        for made, path in written
    ]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    cells = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    print_table(None, [heading.replace("_", " ") for heading in rows[0]], cells)
