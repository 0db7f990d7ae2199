"""What a tracker is: a mirror of the run folder somewhere people look. It never blocks, slows or fails training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol


class Tracker(Protocol):
    """The contract of ``tracking/``: made on rank 0 only; every method returns at once."""

    @property
    def url(self) -> str | None:
        """Where a person can look at this run, if anywhere."""
        ...

    def metrics(self, *, step: int, samples: int, values: Mapping[str, float]) -> None:
        """Record metrics at a step. Points at or before the last recorded step of a metric are not repeated."""
        ...

    def image(self, *, key: str, step: int, path: Path) -> None:
        """Record a PNG file that already lies in the run folder."""
        ...

    def text(self, *, key: str, step: int, path: Path) -> None:
        """Record a text file that already lies in the run folder."""
        ...

    def model(self, *, step: int, uri: str) -> None:
        """Record that a committed checkpoint lies at ``uri`` (bytes are never copied)."""
        ...

    def close(self, status: Literal["finished", "failed", "interrupted"]) -> None:
        """Flush within a bounded time and end the run; what could not be sent stays in the spool."""
        ...
