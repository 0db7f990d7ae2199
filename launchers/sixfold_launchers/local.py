"""Run a recipe's ranks as processes of this machine and answer for all of them as one.

The first rank that fails decides the outcome: the others are ended, its error is what the user sees, and its exit code
is the command's. A rank ended by a signal (out of memory, ``kill -9``) is an environment fault that ``--max-restarts``
may answer with a fresh start of all ranks, which resume from the newest checkpoint that verifies.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

WORKER_MODULE = "sixfold.train.rank"
_POLL_S = 0.05
_PASSED_ON = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the ranks ended.

    Attributes:
        exit_code: 0 when every rank ended well, else the first failing rank's (128 + n for signal n).
        rank: the rank that failed first, if one did.
    """

    exit_code: int
    rank: int | None = None

    @property
    def killed(self) -> bool:
        """Whether a signal ended the failing rank."""
        return self.exit_code > 128


def launch(
    run_folder: Path,
    *,
    ranks: int,
    max_restarts: int = 0,
    inherited: Sequence[int] = (),
    on_restart: Callable[[str], None] = print,
    module: str = WORKER_MODULE,
) -> Outcome:
    """Start ``ranks`` workers on a run folder, wait for them, and restart all of them when one was killed.

    A worker is ``python -m <module> <run folder>``.

    The workers keep the ``inherited`` descriptors open. SIGINT and SIGTERM are passed on to them, so that they save at
    the next step boundary and end.
    """
    restarts = 0
    while True:
        outcome = _launch_once(run_folder, ranks, inherited, module)
        if not outcome.killed or restarts == max_restarts:
            return outcome
        restarts += 1
        on_restart(
            f"rank {outcome.rank} was ended by {signal.Signals(outcome.exit_code - 128).name}; "
            f"restart {restarts} of {max_restarts} from the newest checkpoint"
        )


def _launch_once(run_folder: Path, ranks: int, inherited: Sequence[int], module: str) -> Outcome:
    command = [sys.executable, "-m", module, str(run_folder)]
    shared = rendezvous(ranks)
    # Ranks inherit that these signals are blocked, until they can hear them: a request to stop is never lost or deadly.
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    workers = [
        # A session of their own: Ctrl-C in a terminal reaches the ranks once, through this process.
        subprocess.Popen(
            command,
            env=_without_rendezvous() | rank_environment(rank, shared),
            start_new_session=True,
            pass_fds=inherited,
        )
        for rank in range(ranks)
    ]
    with _signals_passed_on(workers):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        try:
            return _wait(workers)
        finally:
            _end(workers)


def rendezvous(ranks: int) -> dict[str, str]:
    """Where the ranks of one machine meet, and a fair share of its cores for each; nothing for a rank that is alone."""
    if ranks == 1:
        return {}
    threads = max(1, (os.cpu_count() or 1) // ranks)
    return {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }


def rank_environment(rank: int, shared: Mapping[str, str]) -> dict[str, str]:
    """The variables of one rank; a rank that is alone gets none, since libraries take any of them for a group."""
    return {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if shared else {}


def _without_rendezvous() -> dict[str, str]:
    """This process's environment less what another launcher may have set for a job of its own."""
    foreign = {"WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in os.environ.items() if name not in foreign}


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> Outcome:
    """Return at the first failure, or when all ranks ended well."""
    while True:
        codes = [worker.poll() for worker in workers]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed:
            # A rank ended by a signal is the cause; ranks that then lose their connection merely follow.
            rank, code = min(failed, key=lambda item: item[1])
            return Outcome(exit_code=128 - code if code < 0 else code, rank=rank)
        if all(code == 0 for code in codes):
            return Outcome(exit_code=0)
        time.sleep(_POLL_S)


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs: first asking, then not. Ranks stuck in a collective cannot answer a request."""
    deadline = time.monotonic() + 2.0
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    for worker in workers:
        try:
            worker.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


@contextmanager
def _signals_passed_on(workers: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Pass SIGINT and SIGTERM on to the ranks, once each; they save and end at the next step boundary."""

    def pass_on(number: int, _frame: object) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
