"""What a tracker is: a mirror of the run folder somewhere people look. It never blocks, slows or fails training.

The train loop writes to one place, the :class:`~sixfold.tracking.events.EventLog` in the run folder; a tracker follows
that log on its own and shows it elsewhere. So a tracker has nothing to be told, and what it could not send is never
lost: it is still in the log.
"""

from __future__ import annotations

from typing import Protocol


class Tracker(Protocol):
    """The contract of ``tracking/``: made on rank 0 only, by :func:`~sixfold.tracking.tracker.open_tracker`."""

    @property
    def where(self) -> str:
        """Where a person can look at this run: a link, a command or a file."""
        ...

    def close(self) -> None:
        """Send what is still in the log, within a bounded time; the rest is sent by the next attempt or by a replay."""
        ...
