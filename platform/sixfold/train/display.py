"""What a person sees while training: a live bar in a terminal, one line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LINE_INTERVAL_S = 10.0


class Display(Protocol):
    """Shows progress on rank 0; the other ranks have a silent one."""

    def update(self, *, step: int, values: Mapping[str, float], skips: int, checkpoints: int) -> None:
        """Show the newest step with its metrics, named as in the event log."""
        ...

    def note(self, text: str) -> None:
        """Show one line that stays: a fallback, a quarantined sample, an evaluation."""
        ...

    def close(self) -> None:
        """Leave the last state on the screen."""
        ...


class SilentDisplay:
    """Shows nothing."""

    def update(self, *, step: int, values: Mapping[str, float], skips: int, checkpoints: int) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Nothing to leave."""


class LineDisplay:
    """Plain lines for logs and pipes: the first step, the last, and one about every ten seconds."""

    def __init__(self, *, total_steps: int) -> None:
        self.total_steps = total_steps
        self._last = -_LINE_INTERVAL_S

    def update(self, *, step: int, values: Mapping[str, float], skips: int, checkpoints: int) -> None:
        """Print a line if it is time for one."""
        now = time.monotonic()
        if now - self._last < _LINE_INTERVAL_S and step != self.total_steps:
            return
        self._last = now
        self.note(f"step {step}/{self.total_steps}  {_facts(values, skips, checkpoints)}")

    def note(self, text: str) -> None:
        """Print a line; whoever stopped reading (``| head``) does not stop training."""
        try:
            print(text, flush=True)
        except BrokenPipeError:
            sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # all further output

    def close(self) -> None:
        """Nothing to leave."""


class BarDisplay:
    """A live bar with loss, speed, time left, checkpoints and skips."""

    def __init__(self, *, total_steps: int, start_step: int, name: str) -> None:
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(file=sys.stdout), refresh_per_second=4)
        self._task = self._progress.add_task(name, total=total_steps, completed=start_step, facts="")
        self._progress.start()

    def update(self, *, step: int, values: Mapping[str, float], skips: int, checkpoints: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step, facts=_facts(values, skips, checkpoints))

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, highlight=False)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()


def open_display(*, rank: int, total_steps: int, start_step: int, name: str) -> Display:
    """Return the display that suits this rank and where its output goes."""
    if rank != 0:
        return SilentDisplay()
    if sys.stdout.isatty():
        return BarDisplay(total_steps=total_steps, start_step=start_step, name=name)
    return LineDisplay(total_steps=total_steps)


def _facts(values: Mapping[str, float], skips: int, checkpoints: int) -> str:
    facts = [f"loss {values['train/loss']:.4g}"] if "train/loss" in values else []
    rates = (("perf/samples_per_s", "samples/s"), ("perf/tokens_per_s", "tokens/s"))
    facts += [f"{values[name]:,.0f} {unit}" for name, unit in rates if name in values]
    facts.append(f"{checkpoints} saved")
    if skips:
        facts.append(f"{skips} skipped")
    return "  ".join(facts)
