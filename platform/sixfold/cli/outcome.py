"""How a command ends that started ranks: the first failing rank's own words, and one of the command's exit codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import typer

from sixfold.errors import EnvironmentFault, SixfoldError, UserError

if TYPE_CHECKING:
    from sixfold.train.run_folder import RunFolder
    from sixfold_launchers.local import Outcome

EXIT_CODES = (0, SixfoldError.exit_code, UserError.exit_code, EnvironmentFault.exit_code)
"""All that the command may end with."""


def fail(folder: RunFolder, outcome: Outcome) -> NoReturn:
    """Print what the rank that failed first left, and end the command."""
    assert outcome.exit_code, "the ranks ended well"
    typer.echo(folder.failure(outcome.rank, outcome.exit_code), err=True)
    raise typer.Exit(exit_code_of(outcome.exit_code))


def exit_code_of(process_code: int) -> int:
    """The command's exit code for a process's: who was ended by a signal (-n, or 128 + n) met the environment."""
    if process_code < 0 or process_code > 128:
        return EnvironmentFault.exit_code
    return process_code if process_code in EXIT_CODES else SixfoldError.exit_code
