"""What the commands print: consoles, tables and the one screen an error takes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sixfold.errors import Fault, SixfoldError

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH_OF_PIPES = 160
_LINES_OF_PIPES = 40
_LONGEST_LINE = 400


def output_console() -> Console:
    """The console for results: as wide as the terminal, and wide enough for tables when piped."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _WIDTH_OF_PIPES
    return Console(markup=False, highlight=False, emoji=False, width=width)


def print_table(title: str | None, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print aligned columns: folded to the width of a terminal, one line a row when piped."""
    if sys.stdout.isatty():
        _print_rich_table(title, headings, rows)
        return
    lines = [tuple(headings), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    for text in ([title] if title else []) + [_aligned(line, widths) for line in lines]:
        sys.stdout.write(f"{text}\n")


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [" ".join(cell.splitlines()).ljust(width) for cell, width in zip(cells, widths, strict=True)]
    return "  ".join(padded).rstrip()


def _print_rich_table(title: str | None, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", title_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    output_console().print(table)


def print_error(error: SixfoldError) -> None:
    """Print an error's faults to stderr on at most one screen; what does not fit is counted."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=not sys.stderr.isatty())
    for line, style in _error_lines(error.faults, *_room()):
        console.print(Text(line, style=style))


def _room() -> tuple[int, int]:
    """Columns and lines that one screen of stderr has."""
    if not sys.stderr.isatty():
        return _LONGEST_LINE, _LINES_OF_PIPES
    size = shutil.get_terminal_size()
    return size.columns, size.lines - 2  # the prompt, and the line that counts the rest


def _error_lines(faults: Sequence[Fault], columns: int, lines: int) -> list[tuple[str, str]]:
    """Styled lines for as many faults as fit (at least one), and a count of the others."""
    shown: list[tuple[str, str]] = []
    for index, fault in enumerate(faults):
        block = [(_shortened(line), "red" if first == 0 else "") for first, line in enumerate(str(fault).splitlines())]
        height = sum(-(-len(line) // columns) for line, _ in [*shown, *block])
        if shown and height > lines:
            return [*shown, (f"... and {len(faults) - index} more; mend these first", "bold")]
        shown.extend(block)
    return shown


def _shortened(line: str) -> str:
    return line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 3] + "..."
