"""Carries the event log to where people look, behind training's back: the log itself is the spool.

One daemon thread follows ``events.jsonl`` from a cursor kept on disk, hands batches to a :class:`Mirror`, and moves the
cursor when they have arrived. While the far side is away it waits and tries again; whatever is left at the end is found
by the next attempt, or by a replay, at the same place.
"""

from __future__ import annotations

import fcntl
import logging
import math
import threading
import time
from pathlib import Path
from typing import Protocol, TextIO

from sixfold.tracking.events import Event, EventTail

logger = logging.getLogger("sixfold.tracking")

POLL_S = 1.0
LONGEST_WAIT_S = 60.0
RETRY_WHEN_CLOSING_S = 0.5
EVENTS_A_BATCH = 500


class Mirror(Protocol):
    """The far side of one run. Any method may raise: the spool then connects anew and repeats the batch."""

    @property
    def name(self) -> str:
        """What to call it in a message."""
        ...

    def connect(self) -> int:
        """Open or re-open the run, learn what it holds already, and return the cursor: the last sequence sent."""
        ...

    def send(self, events: list[Event]) -> None:
        """Send events; what is already there must be left out, because a batch may be repeated after a crash."""
        ...

    def commit(self, sequence: int) -> None:
        """Persist the cursor, atomically."""
        ...


class Spool:
    """Feeds one mirror from one run's log; used by the tracking thread and, in the foreground, by a replay."""

    def __init__(self, run_dir: Path, mirror: Mirror) -> None:
        self._run_dir = run_dir
        self._mirror = mirror
        self._tail: EventTail | None = None
        self._lock: TextIO | None = None

    def pump(self) -> int:
        """Send one batch and return how many events it had: 0 when everything has been sent."""
        if self._tail is None:
            self._take_lock()
            self._tail = EventTail(self._run_dir, after=self._mirror.connect())
        events = self._tail.read(EVENTS_A_BATCH)
        if events:
            self._mirror.send(events)
            self._mirror.commit(self._tail.sequence)
        return len(events)

    def disconnect(self) -> None:
        """Forget the connection: the next :meth:`pump` starts from the persisted cursor and what the mirror holds."""
        if self._tail is not None:
            self._tail.close()
            self._tail = None

    def close(self) -> None:
        """Release the log and the run's lock."""
        self.disconnect()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        """Hold the run's mirror alone: two senders (an old attempt, a replay) could both send the same point."""
        if self._lock is not None:
            return
        folder = self._run_dir / "mlflow"
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise
        except OSError:
            logger.debug("no file locks on this file system; going on without")
        self._lock = lock


class SpoolThread(threading.Thread):
    """Pumps a spool until stopped. Nothing raised in here reaches training: failures are counted and told once."""

    def __init__(self, spool: Spool, mirror: Mirror) -> None:
        super().__init__(name="sixfold-tracking", daemon=True)
        self.failures = 0
        self.drained = False
        self._spool = spool
        self._mirror = mirror
        self._closing = threading.Event()
        self._deadline_s = math.inf

    def run(self) -> None:
        """Send until stopped and drained, or until the deadline has passed."""
        wait_s, next_try_s = POLL_S, 0.0
        while not self.drained and time.monotonic() < self._deadline_s:
            if time.monotonic() < next_try_s and not self._closing.is_set():
                self._closing.wait(POLL_S)
                continue
            try:
                sent = self._spool.pump()
                wait_s = POLL_S
            except Exception as error:  # a tracker must never fail training, whatever its library raises
                self._tell(error)
                self._spool.disconnect()
                next_try_s, wait_s = time.monotonic() + wait_s, min(2 * wait_s, LONGEST_WAIT_S)
                if self._closing.is_set():
                    time.sleep(RETRY_WHEN_CLOSING_S)
                continue
            if sent == 0:
                self.drained = self._closing.is_set()
                self._closing.wait(POLL_S)
        self._spool.close()

    def stop(self, timeout_s: float) -> bool:
        """Let it drain for at most ``timeout_s`` seconds; return whether everything was sent."""
        self._deadline_s = time.monotonic() + timeout_s
        self._closing.set()
        self.join(timeout_s)
        return self.drained

    def _tell(self, error: Exception) -> None:
        self.failures += 1
        if self.failures > 1:
            return
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        hint = " (pip install 'sixfold[mlflow]', or set tracking.type=jsonl)" if isinstance(error, ImportError) else ""
        logger.warning(
            "%s cannot be used for now: %s%s. Training goes on; events.jsonl keeps everything and it is tried again",
            self._mirror.name,
            reason,
            hint,
        )
