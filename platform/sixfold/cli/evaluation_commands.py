"""``sixfold evaluate``: what a trained run is worth, as one table."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder or a run id.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command(epilog="Example: sixfold evaluate runs/smoke/dit --samples 5000 --json")(evaluate)


def evaluate(
    run: RunArgument,
    samples: Annotated[
        int | None, typer.Option(min=2, help="Samples to draw.", show_default="as the recipe says")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Measure a run's newest checkpoint as its recipe's evaluation section says, on averaged weights if it has them."""
    from sixfold.cli.screen import print_table
    from sixfold.evaluation.report import HEADINGS, logged, table_rows
    from sixfold.tracking.runs import find_run
    from sixfold.train.inference import evaluate_run

    folder = find_run(run)
    measured = evaluate_run(folder, samples=samples)
    if as_json:
        estimates = [asdict(estimate) for estimate in measured.estimates]
        typer.echo(json.dumps({"step": measured.step, **logged(measured.estimates), "estimates": estimates}))
        return
    print_table(f"{folder} after step {measured.step}", HEADINGS, table_rows(measured.estimates))
