"""``sixfold compare`` tells how far two runs' metrics are apart."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sixfold.tracking.compare import MetricDifference

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder or a run id.", show_default=False)]
_SHOWN_STEPS = 8


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog="Example: sixfold compare runs/parity/one-process runs/parity/fsdp --rtol 1e-5")(compare)


def compare(
    run_a: RunArgument,
    run_b: RunArgument,
    rtol: Annotated[
        float | None,
        typer.Option(min=0, help="Exit with 1 if any metric differs by more, relatively, or is missing in one run."),
    ] = None,
    common: Annotated[
        bool, typer.Option("--common", help="Let --rtol judge the steps that both runs have, and nothing else.")
    ] = False,
    machine: Annotated[
        bool, typer.Option("--machine", help="Also compare perf/, data/, system/ and ckpt/ metrics.")
    ] = False,
    runs: Annotated[Path, typer.Option(help="Folder in which run ids are looked up.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the largest relative difference of every metric over the steps that two runs share, and what one lacks."""
    from sixfold.errors import UserError
    from sixfold.tracking.compare import compare as compare_runs
    from sixfold.tracking.runs import find_run

    folder_a, folder_b = find_run(run_a, runs), find_run(run_b, runs)
    differences = compare_runs(folder_a, folder_b, machine=machine)
    if not any(difference.common_steps for difference in differences):
        raise UserError.of(
            "the two runs share no metric at any step, so there is nothing to compare",
            where=f"{folder_a}, {folder_b}",
            fix="train both runs over the same steps with the same train.log_every_steps",
        )
    beyond, missing = _failing(differences, rtol, common=common)
    if as_json:
        record = {
            "run_a": str(folder_a),
            "run_b": str(folder_b),
            "rtol": rtol,
            "beyond_rtol": beyond,
            "missing": missing,
            "metrics": [_as_json(difference) for difference in differences],
        }
        typer.echo(json.dumps(record, indent=2))
    else:
        _print(differences)
        if rtol is not None:
            _print_verdict(differences, beyond, missing, rtol)
    raise typer.Exit(1 if beyond or missing else 0)


def _failing(differences: list[MetricDifference], rtol: float | None, *, common: bool) -> tuple[list[str], list[str]]:
    """The metrics that differ by more than ``rtol``, and those that one run lacks somewhere; none without ``rtol``."""
    if rtol is None:
        return [], []
    beyond = [difference.name for difference in differences if difference.largest > rtol]
    return beyond, [] if common else [difference.name for difference in differences if difference.incomplete]


def _print(differences: list[MetricDifference]) -> None:
    from sixfold.cli.screen import print_table

    headings = ("metric", "largest relative difference", "at step", "run A", "run B", "common steps", "missing steps")
    rows = [
        (
            difference.name,
            f"{difference.largest:.3e}" if difference.common_steps else "-",
            _plain(difference.step),
            _plain(difference.value_a),
            _plain(difference.value_b),
            str(difference.common_steps),
            _all_missing(difference) or "-",
        )
        for difference in differences
    ]
    print_table(None, headings, rows)


def _print_verdict(differences: list[MetricDifference], beyond: list[str], missing: list[str], rtol: float) -> None:
    if beyond:
        typer.echo(f"beyond {rtol:g}: {', '.join(beyond)}")
    if missing:
        lacking = [f"{each.name} ({_all_missing(each)})" for each in differences if each.name in missing]
        typer.echo(f"missing: {', '.join(lacking)}; --common judges the steps that both runs have")
    if not beyond and not missing:
        typer.echo(f"all within {rtol:g}")


def _all_missing(difference: MetricDifference) -> str:
    return "; ".join(filter(None, (_missing("B", difference.only_in_a), _missing("A", difference.only_in_b))))


def _missing(run: str, steps: tuple[int, ...]) -> str:
    if not steps:
        return ""
    shown = ", ".join(str(step) for step in steps[:_SHOWN_STEPS])
    more = f" and {len(steps) - _SHOWN_STEPS} more" if len(steps) > _SHOWN_STEPS else ""
    return f"{run} lacks {shown}{more}"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.9g}"


def _as_json(difference: MetricDifference) -> dict[str, Any]:
    """JSON has no word for non-finite numbers: they are written as in the event log."""
    record = asdict(difference)
    for key in ("largest", "value_a", "value_b"):
        value = record[key]
        if value is not None and not math.isfinite(value):
            record[key] = "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return record
