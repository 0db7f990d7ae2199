"""The driver of a Ray job: ``python -m sixfold_launchers.ray_driver ORDER`` on the cluster's head.

It keeps a child that talks to Ray, and starts another when that one is killed: ranks belong to the child, so Ray ends
them with it, and the next child's ranks resume from the newest checkpoint that verifies.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

from sixfold.errors import SixfoldError
from sixfold_launchers.ray_order import DRIVER_MODULE, Order

_ATTEMPT = "--attempt"
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def main(arguments: list[str]) -> int:
    """Drive the order named; return the exit code: 0 when every run finished or was stopped, else 1."""
    if arguments[0] == _ATTEMPT:
        return _attempt(Path(arguments[1]))
    path = Path(arguments[0]).absolute()
    try:
        return _supervise(path, Order.read(path))
    except SixfoldError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


def _supervise(path: Path, order: Order) -> int:
    restarts = 0
    order.logs.mkdir(parents=True, exist_ok=True)
    with (order.logs / "ray.out").open("ab", buffering=0) as log:
        while True:
            code = _run_child([sys.executable, "-m", DRIVER_MODULE, _ATTEMPT, str(path)], log)
            if code >= 0 or order.requests.read() == "stop" or restarts == order.profile.max_failures:
                return code if code >= 0 else 128 - code
            restarts += 1
            _write(f"sixfold: the driver was ended by {signal.Signals(-code).name}; restart {restarts}\n".encode(), log)


def _run_child(command: list[str], log: BinaryIO) -> int:
    """Run the child to its end, its words written to the job's log as well as to Ray's; who ends us ends it."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:

        def pass_on(number: int, _frame: object) -> None:
            child.send_signal(number)
            os._exit(128 + number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, pass_on)
        assert child.stdout is not None
        for line in child.stdout:
            _write(line, log)
        return child.wait()


def _write(line: bytes, log: BinaryIO) -> None:
    log.write(line)
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def _end_with_parent() -> None:
    """Have the kernel end this process when its parent is gone: nobody would answer for its ranks."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _attempt(path: Path) -> int:
    from sixfold.train.run_folder import RunFolder
    from sixfold_launchers.ray_train import TrainingFailedError, connect, train_run

    _end_with_parent()
    order = Order.read(path)
    connect()
    failed = 0
    for run in order.runs:
        if order.requests.read() == "stop":
            break
        try:
            sys.stdout.write(f"sixfold: {run.name}: {train_run(path, order, run)}\n")
        except SixfoldError as error:
            sys.stderr.write(f"{run}: {error}\n")
            failed = error.exit_code
        except TrainingFailedError as error:
            sys.stderr.write(f"{error}\n{RunFolder(run).failure(0, 1)}\n")
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
