"""``sixfold doctor``: what this machine has, what is missing for which use, and how to get it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from sixfold.cli.screen import print_table


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("doctor")(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list instead of a table.")] = False,
) -> None:
    """Say what is missing on this machine, and the fix; exit 3 if training itself is impossible.

    Example: sixfold doctor
    """
    from sixfold.train.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([vars(finding) for finding in findings]))
    else:
        rows = [(finding.state, finding.subject, finding.detail, finding.fix) for finding in findings]
        print_table(None, ("state", "what", "found", "fix"), rows)
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(3)
