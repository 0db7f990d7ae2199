"""A pool of gloo ranks that starts once and runs many distributed test cases: starting ranks costs more than the cases.

``pool.run(function, *args)`` calls an importable function on every rank, inside one process group, and returns the
results by rank. A failure on any rank is raised here with that rank's traceback; a hang ends in a timeout. When a rank
did not answer, the pool is replaced before the next case, so that one broken case cannot spoil another.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 120.0
CASE_TIMEOUT_S = 120.0
RENDEZVOUS_TIMEOUT_S = 60.0


class RankFailure(AssertionError):
    """A rank raised, died or did not answer in time."""


class RankPool:
    """``size`` processes in one gloo group on loopback, one thread each."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: Path | None = None

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = CASE_TIMEOUT_S) -> list[Any]:
        """Call ``function(*args)`` on all ranks; the function stands at the top level of an importable module."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = self._answers(timeout_s)
        failures = {rank: text for rank, (ok, text) in answers.items() if not ok}
        missing = sorted(set(range(self.size)) - set(answers))
        if failures or missing:
            if missing or not all(process.is_alive() for process in self._processes):
                self._kill()
            parts = [f"rank {rank} of {self.size}:\n{text}" for rank, text in sorted(failures.items())]
            if missing:
                parts.append(f"ranks {missing} of {self.size} gave no answer in {timeout_s} s")
            raise RankFailure("\n".join(parts))
        return [answers[rank][1] for rank in range(self.size)]

    def close(self) -> None:
        """End the ranks: let them leave their group, then insist."""
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                continue  # that rank is gone already
        deadline = time.monotonic() + 5.0
        for process in self._processes:
            process.join(max(0.1, deadline - time.monotonic()))
        self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._processes, self._pipes, self._folder = [], [], None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        port = _free_port()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self.size, str(self._folder / "store"), port, list(sys.path), theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        answers = self._answers(START_TIMEOUT_S)
        failures = [str(text) for ok, text in answers.values() if not ok]
        if failures or len(answers) < self.size:
            self._kill()
            raise RankFailure("\n".join(["ranks did not start", *failures]))

    def _answers(self, timeout_s: float) -> dict[int, tuple[bool, Any]]:
        """Collect answers until all have come, one failed (the others then hang), or time is up."""
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < self.size and (left := deadline - time.monotonic()) > 0:
            if any(not ok for ok, _ in answers.values()):
                deadline = min(deadline, time.monotonic() + 2.0)  # a moment for the other ranks' tracebacks
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            for pipe in wait(waiting, timeout=left):
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]  # wait returns the connections it was given
                try:
                    answers[rank] = pipe.recv()  # type: ignore[union-attr]  # see above
                except EOFError:
                    self._processes[rank].join()
                    answers[rank] = (False, f"the process died with exit code {self._processes[rank].exitcode}")
        return answers


_pools: dict[int, RankPool] = {}


def rank_pool(size: int) -> RankPool:
    """Return this session's pool of the given size."""
    if size not in _pools:
        _pools[size] = RankPool(size)
        atexit.register(_pools[size].close)
    return _pools[size]


def _serve(rank: int, size: int, store: str, port: int, path: list[str], pipe: Connection) -> None:
    """What a rank does: join the group, then answer calls until told to leave."""
    sys.path[:] = [
        *path,
        str(Path(__file__).parent.parent),
    ]  # test modules are named from the root: tests.unit.test_...
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),  # unused for our own group (a file), read by libraries that look for it
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    try:
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=RENDEZVOUS_TIMEOUT_S),
        )
        dist.barrier()
        pipe.send((True, None))
    except Exception:  # the whole point is to hand any failure to the parent
        pipe.send((False, traceback.format_exc()))
        return
    while (call := pipe.recv()) is not None:
        function, args = call
        _end_groups_of_former_cases()
        try:
            answer = (True, function(*args))
        except Exception:  # as above
            answer = (False, traceback.format_exc())
        try:
            pipe.send(answer)
        except Exception:  # an answer that cannot be pickled is a failure of the case, not of the pool
            pipe.send((False, traceback.format_exc()))
    from sixfold.distributed.process_group import leave

    leave()


def _end_groups_of_former_cases() -> None:
    """End the groups that nothing shares: the threads of each wake a hundred times a second for as long as it lives."""
    import torch.distributed as dist

    from sixfold.distributed import process_group

    shared = [dist.group.WORLD, process_group._agreement_group]
    shared += [group for mesh in process_group._meshes.values() for group in mesh.get_all_groups()]
    if (deepspeed_groups := sys.modules.get("deepspeed.utils.groups")) is not None:
        shared.append(deepspeed_groups._WORLD_GROUP)  # which it makes once a process
    left = [group for group in dist.distributed_c10d._world.pg_map if group not in shared]
    while left:
        dist.destroy_process_group(left.pop())
    gc.collect()  # what still holds one


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
