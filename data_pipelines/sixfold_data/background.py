"""Fetching shards in the background of a process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class Fetcher:
    """A few daemon threads that fetch shards in the order asked for, each shard once at a time.

    They are daemons, because a process that is done must not wait for a shard that nobody will read.

    Args:
        fetch: brings one shard; must not raise.
        threads: started as they are needed.
    """

    def __init__(self, fetch: Callable[[str], None], threads: int = 2) -> None:
        self._fetch = fetch
        self._threads = threads
        self._running: list[threading.Thread] = []
        self._waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def submit(self, path: str) -> None:
        """Ask for a shard; returns at once, and does nothing if it is being fetched or waits for it."""
        with self._lock:
            if path in self._known:
                return
            self._known.add(path)
            if len(self._running) < self._threads:
                thread = threading.Thread(target=self._work, name="sixfold-fetch", daemon=True)
                self._running.append(thread)
                thread.start()
        self._waiting.put(path)

    def stop(self) -> None:
        """Let the threads end after the shard in hand."""
        for _ in self._running:
            self._waiting.put(None)

    def _work(self) -> None:
        while (path := self._waiting.get()) is not None:
            try:
                self._fetch(path)
            finally:
                with self._lock:
                    self._known.discard(path)
