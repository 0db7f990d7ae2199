"""The ``sixfold`` command: finds its sub-commands, and turns errors into one screen and an exit code.

Command modules import heavy libraries inside their functions, so that every help text and every command that only reads
recipes answers at once.
"""

from __future__ import annotations

import sys
import traceback
from importlib import import_module

import typer

from sixfold.cli.outcome import EXIT_CODES
from sixfold.errors import SixfoldError, user_facing

COMMAND_MODULES = (
    "sixfold.cli.inspect_commands",
    "sixfold.cli.run_commands",
    "sixfold.cli.submit_commands",
    "sixfold.cli.evaluation_commands",
    "sixfold.cli.tabulate_command",
    "sixfold.cli.plan_command",
    "sixfold.cli.compare_command",
    "sixfold.cli.data_commands",
    "sixfold.cli.ui_command",
    "sixfold.cli.ray_commands",
    "sixfold.cli.doctor_command",
)
"""Modules with a ``register(app)`` that adds their commands, in the order of ``sixfold --help``."""


def build_app() -> typer.Typer:
    """Assemble the command from its modules."""
    app = typer.Typer(
        name="sixfold",
        help="One recipe trains any generative model, on a laptop or a cluster, and resumes exactly.",
        epilog="Start with: sixfold recipes, then sixfold run flow/dit-smoke",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for module in COMMAND_MODULES:
        import_module(module).register(app)
    return app


def main() -> int:
    """Run the command line and return its exit code: 0 done, 2 the input, 3 the environment, 1 anything else."""
    code = _run()
    return code if code in EXIT_CODES else SixfoldError.exit_code  # typer has more of its own, as for Ctrl-C


def _run() -> int:
    from sixfold.cli.screen import print_error

    try:
        build_app()(prog_name="sixfold")
    except SystemExit as end:  # how typer ends, usage errors included
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:  # before typer could hear it
        return SixfoldError.exit_code
    except Exception as error:  # the last place that can still tell the user
        known = user_facing(error)
        if known is None:  # a fault of the code itself, hence the traceback
            traceback.print_exc(file=sys.stderr)
            return 1
        print_error(known)
        return known.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
