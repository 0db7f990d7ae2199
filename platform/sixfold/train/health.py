"""A run that stands still ends itself: every rank leaves its stacks and a record, and dies for the launcher to restart.

A rank that hangs (a stuck file system, a dead link, a deadlock) holds all others in a collective, for ever or until a
timeout that says nothing about the cause. Each rank therefore watches its own progress from a thread, which also runs
while the main thread waits in a kernel or a collective. All ranks see the same stillness at about the same time.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # it ships no types

from sixfold.train.loop import StepRecord, Training
from sixfold.train.run_folder import RunFolder

LEAST_BUDGET_S = 1800.0
"""Steps include evaluation, saving and, the first time, compilation: a default must not take those for a hang."""
STEPS_OF_BUDGET = 100.0
"""The default budget in median steps, where that is more."""
GRACE_S = 3.0
"""How long a rank that found a hang waits for the others to find it too, before it ends."""
_REMEMBERED_STEPS = 50


class HangDetector:
    """Watches for progress in the context that it is; a hook that is called after every step.

    What comes before the first step and after the last (ranks that find each other, restoring, the tracker's last
    words) has the default budget, steps have the one that :meth:`during_steps` gives them.

    Args:
        folder: the run's.
        rank: this process's.
    """

    def __init__(self, folder: RunFolder, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._wanted: float | None = None
        self._step = 0
        self._last = time.monotonic()
        self._durations: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang-detector", daemon=True)

    def __enter__(self) -> HangDetector:
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    @contextmanager
    def during_steps(self, budget_s: float | None, *, after: int) -> Iterator[None]:
        """Watch steps, the first of which follows step ``after``.

        Args:
            budget_s: longest time from the end of one step to the end of the next, hooks included; None derives it
                from the steps so far.
            after: the step before them.
        """
        self._step, self._last = after, time.monotonic()
        self._wanted = budget_s  # in this order, as the thread reads them in the other
        try:
            yield
        finally:
            self._wanted, self._last = None, time.monotonic()

    def __call__(self, training: Training, record: StepRecord) -> None:
        """Note that a step has ended."""
        now = time.monotonic()
        self._durations.append(now - self._last)
        self._step, self._last = record.progress.step, now

    @property
    def budget_s(self) -> float:
        """How long what is done now may take."""
        if self._wanted is not None:
            return self._wanted
        median = statistics.median(self._durations) if self._durations else 0.0
        return max(LEAST_BUDGET_S, STEPS_OF_BUDGET * median)

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.budget_s / 10)):
            budget_s = self.budget_s
            still_s = time.monotonic() - self._last
            if still_s > budget_s:
                self._end(still_s)

    def _end(self, still_s: float) -> None:
        """Leave what explains the hang, wait for the other ranks to do the same, and die by a signal."""
        left = self._leave_record(still_s)
        self._folder.leave_hang(
            self._rank,
            f"rank {self._rank} on {socket.gethostname()} hung: no step within {self.budget_s:.0f} s after step "
            f"{self._step}; ended by SIGABRT\n  the stacks of all ranks: {left.parent}\n"
            "  fix: look for the rank whose stack is not in a collective; if steps are just slow, raise "
            "train.hang_after_s",
        )
        if self._stopped.wait(GRACE_S):
            return  # it went on after all, just as the budget ended
        os.kill(os.getpid(), signal.SIGABRT)  # like any other death by a signal: launchers restart

    def _leave_record(self, still_s: float) -> Path:
        """Write this rank's stacks and what it did last; return the file of the stacks."""
        folder = self._folder.path / "hangs" / f"after-step-{self._step}"
        folder.mkdir(parents=True, exist_ok=True)
        stacks = folder / f"rank-{self._rank}.stacks.txt"
        with stacks.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        record = {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
            "last_step": self._step,
            "still_s": still_s,
            "budget_s": self.budget_s,
            "recent_step_s": list(self._durations),
            "load": os.getloadavg(),
            "memory_available_bytes": psutil.virtual_memory().available,
            "resident_bytes": psutil.Process().memory_info().rss,
        }
        (folder / f"rank-{self._rank}.json").write_text(json.dumps(record, indent=1) + "\n")
        _dump_nccl_flight_record(folder / f"rank-{self._rank}.nccl.pickle")
        return stacks


def _dump_nccl_flight_record(path: Path) -> None:
    """Write NCCL's own record of recent collectives, where this torch was built with it and it is recording."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_nccl_available() or not dist.is_initialized():
        return
    from torch._C import _distributed_c10d as c10d

    dump = getattr(c10d, "_dump_nccl_trace", None)
    if dump is not None:
        path.write_bytes(dump())
