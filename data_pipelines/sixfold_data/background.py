"""What a process does in its background: fetching shards, and making the next item of an iterator."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

LEAVE_S = 10.0
"""How long a thread that reads ahead is waited for; the read of a remote shard may take longer, and is left."""


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


class ReadAhead(Generic[Item]):
    """An iterator whose next item is made by a thread while the last one is in use: one ahead, in the same order.

    Nothing is made before the first item is asked for. The thread is a daemon, and ends with the iterator.

    Args:
        items: what to iterate over; only the thread touches it.
        prepare: called once in the thread, before it makes anything.
    """

    def __init__(self, items: Iterator[Item], prepare: Callable[[], None] = lambda: None) -> None:
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[Item | BaseException] = queue.SimpleQueue()
        work = (items, prepare, self._asked, self._made)
        self._thread = threading.Thread(target=_make_items, args=work, name="sixfold-read-ahead", daemon=True)
        self._stop = weakref.finalize(self, _stop, self._thread, self._asked)

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._thread.ident is None:
            self._thread.start()
            self._asked.put(True)
        made = self._made.get()
        if isinstance(made, BaseException):
            self._made.put(made)  # the thread has ended, and whoever asks again hears why
            raise made
        self._asked.put(True)
        return made

    def close(self) -> None:
        """Let the thread end after the item in hand."""
        self._stop()


def _stop(thread: threading.Thread, asked: queue.SimpleQueue[bool]) -> None:
    """Ask a thread to end and wait a while: an interpreter that ends under a thread in compiled code may abort."""
    asked.put(False)
    if thread.is_alive() and thread is not threading.current_thread():
        thread.join(LEAVE_S)


def _make_items(
    items: Iterator[Item],
    prepare: Callable[[], None],
    asked: queue.SimpleQueue[bool],
    made: queue.SimpleQueue[Item | BaseException],
) -> None:
    """Make an item whenever one is asked for, until there are no more."""
    try:
        prepare()
        while asked.get():
            made.put(next(items))
    except BaseException as error:  # handed over, to be raised where the item is asked for
        made.put(error)
