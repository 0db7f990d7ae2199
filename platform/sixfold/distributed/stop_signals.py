"""The signals that ask a rank to save and end, and what of its children must not hear them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What asks a rank to save and end."""


def shield() -> None:
    """Block the signals in this thread, and in the processes that it starts from now on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


@contextmanager
def children_shielded() -> Iterator[None]:
    """Start processes that never hear the signals.

    Schedulers signal every process of a step, not ranks alone; a rank whose loaders have ended cannot save.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
