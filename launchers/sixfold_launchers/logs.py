"""Reading log files that are being written, until the job that writes them has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sixfold_launchers.contract import ENDED, State

_AT_REST: frozenset[State] = ENDED | {"interrupted"}
_POLL_S = 0.5
_POLLS_A_STATE = 6  # the scheduler is asked less often than the disk


def follow_files(
    folder: Path, pattern: str, state: Callable[[], State] | None = None, *, read: dict[Path, int] | None = None
) -> Iterator[str]:
    """Yield what the files of a folder hold, file by file; with ``state`` also what is added until the job rests.

    Where several files grow at a time, each new piece is headed by the name of its file.

    Args:
        folder: where the files lie.
        pattern: which of them to read.
        state: asks the scheduler; a job rests when it has ended, or was interrupted and waits to be requeued.
        read: how far each file has been read, kept up to date, so that another call goes on from there.
    """
    read = {} if read is None else read
    last: Path | None = None
    for ended in _polls(state):
        for path in sorted(folder.glob(pattern)):
            with path.open(encoding="utf-8", errors="replace") as file:
                file.seek(read.get(path, 0))
                piece = file.read()
                read[path] = file.tell()
            if piece:
                if len(read) > 1 and path != last:
                    yield f"==> {path.name} <==\n"
                last = path
                yield piece
        if ended:
            return


def _polls(state: Callable[[], State] | None) -> Iterator[bool]:
    """Yield whether this is the last look, with pauses between the looks."""
    while state is not None and state() not in _AT_REST:
        for _ in range(_POLLS_A_STATE):
            yield False
            time.sleep(_POLL_S)
    yield True
