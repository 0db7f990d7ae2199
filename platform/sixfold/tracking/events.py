"""The event log: one append-only ``events.jsonl`` a run, the record that every tracker mirrors.

A metrics line is ``{"time", "step", "samples", "metrics": {name: value}, "sequence"}``; any other line carries
``"event"`` (its kind) in place of ``"metrics"``. ``time`` is in seconds since the epoch. ``sequence`` counts lines over
the whole life of the run and is never used twice, so that a reader can keep its place although the file is rewritten
when a run is rewound.
JSON has no word for non-finite numbers: they are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal

from sixfold.errors import EnvironmentFault, SixfoldError, UserError

EVENTS = "events.jsonl"
SUPERSEDED = "events.superseded.jsonl"

Event = dict[str, Any]
Status = Literal["finished", "failed", "interrupted"]

# What happened to the process stays true when training goes back to an earlier step; what training produced does not.
_HISTORY = frozenset({"started", "resumed", "rolled_back", "finished"})
_TAIL_BLOCK_BYTES = 1 << 16


class EventLog:
    """The writer of a run's events; one a run, on rank 0. Methods may be called from several threads.

    A line is written by one append and handed to the operating system at once: killing the process loses nothing that
    was logged. A line that a crash tore is cut off when the log is opened again.

    Raises:
        EnvironmentFault: the file cannot be written (for example, because the disk is full).
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.path = run_dir / EVENTS
        self._lock = threading.Lock()
        run_dir.mkdir(parents=True, exist_ok=True)
        last = _cut_torn_tail(self.path)
        self._sequence = int(last["sequence"]) if last is not None else 0
        self._attempt = 0
        self._progress = (0, 0)
        self._descriptor = self._open()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1; 0 before :meth:`begin`."""
        return self._attempt

    @property
    def progress(self) -> tuple[int, int]:
        """``(step, samples)`` of the newest metrics that this attempt logged; zeros before the first."""
        return self._progress

    def begin(self, *, step: int) -> int:
        """Open an attempt that continues after ``step`` finished steps, and return its number (1 for the first).

        Events after ``step`` belong to work that will be done again: they move to ``events.superseded.jsonl``.
        """
        with self._lock:
            attempts = [event["attempt"] for event in _read(self.path) if "attempt" in event]
            self._attempt = 1 + max(attempts, default=0)
            kind = "started" if self._attempt == 1 else "resumed"
            self._rewind(step, {"event": kind, "step": step, "attempt": self._attempt})
        return self._attempt

    def metrics(self, *, step: int, samples: int, values: Mapping[str, float]) -> None:
        """Record metrics measured after ``step`` steps and ``samples`` samples."""
        encoded = {name: _encode(float(value)) for name, value in values.items()}
        self._append({"step": step, "samples": samples, "metrics": encoded})
        self._progress = (step, samples)

    def image(self, *, key: str, step: int, path: Path) -> None:
        """Record a PNG file that lies in the run folder."""
        self._append({"event": "image", "step": step, "key": key, "path": self._relative(path)})

    def text(self, *, key: str, step: int, path: Path) -> None:
        """Record a UTF-8 text file that lies in the run folder."""
        self._append({"event": "text", "step": step, "key": key, "path": self._relative(path)})

    def checkpoint(self, *, step: int, uri: str) -> None:
        """Record that the checkpoint at ``uri`` is committed."""
        self._append({"event": "checkpoint", "step": step, "uri": uri}, durable=True)

    def skipped(self, *, step: int, reason: str) -> None:
        """Record that all ranks agreed to skip the update of ``step``."""
        self._append({"event": "skipped", "step": step, "reason": reason})

    def rolled_back(self, *, from_step: int, to_step: int) -> None:
        """Record that training went back to ``to_step``; events after it are superseded as by :meth:`begin`."""
        with self._lock:
            self._rewind(to_step, {"event": "rolled_back", "step": to_step, "from_step": from_step})

    def finished(self, *, step: int, status: Status) -> None:
        """Record how this attempt ended."""
        self._append({"event": "finished", "step": step, "attempt": self._attempt, "status": status}, durable=True)

    def close(self) -> None:
        """Release the file. Nothing is buffered, so nothing is lost without it."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _relative(self, path: Path) -> str:
        """Name a file by its place in the run folder, so that the folder can be moved."""
        folder = self.run_dir.resolve()
        assert path.resolve().is_relative_to(folder), f"{path} does not lie in the run folder {folder}"
        return path.resolve().relative_to(folder).as_posix()

    def _stamp(self, event: Event) -> Event:
        self._sequence += 1
        return {"time": time.time(), **event, "sequence": self._sequence}

    def _append(self, event: Event, *, durable: bool = False) -> None:
        with self._lock:
            assert self._descriptor >= 0, "the event log is closed"
            _write_all(self._descriptor, _line(self._stamp(event)), self.path)
            if durable:
                os.fsync(self._descriptor)

    def _rewind(self, step: int, marker: Event) -> None:
        """Set aside what training produced after ``step`` and append ``marker``, which keeps the sequence growing."""
        superseded = [event for event in _read(self.path) if _is_superseded(event, step)]
        if not superseded:
            _write_all(self._descriptor, _line(self._stamp(marker)), self.path)
            return
        self._preserve(superseded)
        dropped = {event["sequence"] for event in superseded}
        kept = (event for event in _read(self.path) if event["sequence"] not in dropped)
        replacement = self.path.with_suffix(".tmp")
        _write_lines(replacement, "wb", chain(kept, [self._stamp(marker)]))
        replacement.replace(self.path)
        os.close(self._descriptor)
        self._descriptor = self._open()

    def _preserve(self, events: Iterable[Event]) -> None:
        """Append events to ``events.superseded.jsonl``, once each even if an earlier attempt died while doing it."""
        path = self.run_dir / SUPERSEDED
        _cut_torn_tail(path)
        present = {event["sequence"] for event in _read(path)}
        _write_lines(path, "ab", (event for event in events if event["sequence"] not in present))


class EventTail:
    """Follows a log that is being written: yields each complete event after a sequence number, once."""

    def __init__(self, run_dir: Path, *, after: int) -> None:
        self._path = run_dir / EVENTS
        self._file: BinaryIO | None = None
        self.sequence = after

    def read(self, limit: int) -> list[Event]:
        """Return up to ``limit`` events that follow; empty when there are none yet."""
        events: list[Event] = []
        while len(events) < limit and (line := self._next_line()) is not None:
            event = _parse(line)
            if event is not None and event["sequence"] > self.sequence:
                self.sequence = event["sequence"]
                events.append(event)
        return events

    def close(self) -> None:
        """Release the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _next_line(self) -> bytes | None:
        if self._file is None or self._was_replaced(self._file):
            self.close()
            if not self._path.exists():
                return None
            self._file = self._path.open("rb")
        start = self._file.tell()
        line = self._file.readline()
        if line.endswith(b"\n"):
            return line
        self._file.seek(start)  # the writer is in the middle of it
        return None

    def _was_replaced(self, file: BinaryIO) -> bool:
        try:
            return self._path.stat().st_ino != os.fstat(file.fileno()).st_ino
        except FileNotFoundError:
            return False


def read_events(run_dir: Path) -> Iterator[Event]:
    """Yield a run's events in order; a line that is still being written is left out.

    Raises:
        UserError: the folder has no event log, or the log holds a line that is not an event.
    """
    path = run_dir / EVENTS
    if not path.is_file():
        raise UserError.of("there is no event log", where=str(path), fix="name a run folder that training has written")
    return _read(path)


def read_metrics(run_dir: Path) -> dict[str, dict[int, float]]:
    """Return ``{metric: {step: value}}`` of a run, without superseded points.

    Raises:
        UserError: as :func:`read_events`.
    """
    metrics: dict[str, dict[int, float]] = {}
    for event in read_events(run_dir):
        for name, value in event.get("metrics", {}).items():
            metrics.setdefault(name, {})[int(event["step"])] = float(value)
    return metrics


def last_status(run_dir: Path) -> Status | None:
    """Return how the run's last attempt ended; None if none has ended yet."""
    statuses = [event["status"] for event in read_events(run_dir) if event.get("event") == "finished"]
    return statuses[-1] if statuses else None


def _is_superseded(event: Event, step: int) -> bool:
    return int(event["step"]) > step and event.get("event") not in _HISTORY


def _encode(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _line(event: Event) -> bytes:
    return json.dumps(event, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and {"step", "sequence"} <= event.keys() else None


def _read(path: Path) -> Iterator[Event]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            event = _parse(line)
            if event is not None:
                yield event
            elif line.endswith(b"\n"):
                raise UserError.of(
                    "this line is not an event",
                    where=f"{path}:{number}",
                    allowed='one JSON object a line, with "step" and "sequence"',
                    fix="remove the line; the checkpoints do not depend on it",
                )


def _cut_torn_tail(path: Path) -> Event | None:
    """Cut what follows the last whole event (a crash tore it) and return that event, if there is one."""
    if not path.exists():
        return None
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        tail = b""
        start = end
        while start > 0:
            start = max(0, start - _TAIL_BLOCK_BYTES)
            file.seek(start)
            tail = file.read(end - start)
            lines = tail.splitlines(keepends=True)
            position = end
            for line in reversed(lines if start == 0 else lines[1:]):
                event = _parse(line) if line.endswith(b"\n") else None
                if event is not None:
                    file.truncate(position)
                    return event
                position -= len(line)
        if b"\n" not in tail:
            file.truncate(0)
    return None  # nothing in it is an event: whoever reads it is told which line is not


def _write_lines(path: Path, mode: Literal["wb", "ab"], events: Iterable[Event]) -> None:
    try:
        with path.open(mode) as file:
            file.writelines(_line(event) for event in events)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritable(path, error) from error


def _write_all(descriptor: int, data: bytes, path: Path) -> None:
    """Append ``data`` whole or not at all."""
    size = os.fstat(descriptor).st_size
    written = 0
    try:
        while written < len(data):
            written += os.write(descriptor, data[written:])
    except OSError as error:
        os.ftruncate(descriptor, size)
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> SixfoldError:
    return EnvironmentFault.of(
        f"the event log cannot be written: {error.strerror}",
        where=str(path),
        fix="make room on the disk, then run the same command again; it resumes from the last checkpoint",
    )
