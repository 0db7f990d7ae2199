"""The driver of a Ray job: ``python -m sixfold_launchers.ray_driver ORDER`` on the cluster's head.

It keeps a child that talks to Ray, and starts another when that one is killed: ranks belong to the child, so Ray ends
them with it, and the next child's ranks resume from the newest checkpoint that verifies.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from sixfold.errors import SixfoldError
from sixfold_launchers.contract import leave_outcome, read_outcome
from sixfold_launchers.ray_order import DRIVER_MODULE, Order, Requests

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_LIBC = ctypes.CDLL(None)


def main() -> int:
    """Drive the order named; return the exit code: 0 when every run finished or was stopped, else 1."""
    parser = argparse.ArgumentParser(prog=DRIVER_MODULE)
    parser.add_argument("order", type=Path)
    parser.add_argument("--run", type=Path, help="the one run to train; by default all of the order")
    parser.add_argument("--log", type=Path, help="file that driver and ranks are also written to")
    parser.add_argument("--attempt", action="store_true", help="be the child")
    options = parser.parse_args()
    try:
        order = Order.read(options.order)
        runs = order.runs if options.run is None else (options.run,)
        return _attempt(options.order, order, runs) if options.attempt else _supervise(order, runs, options.log)
    except SixfoldError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


def _supervise(order: Order, runs: tuple[Path, ...], log_file: Path | None) -> int:
    command = [sys.executable, "-m", DRIVER_MODULE, "--attempt", *sys.argv[1:]]
    restarts = 0
    with ExitStack() as stack:
        outputs: list[BinaryIO] = [sys.stdout.buffer]
        if log_file is not None:
            outputs.append(stack.enter_context(log_file.open("ab")))
        while True:
            code = _run_child(command, outputs)
            if code >= 0 or restarts == order.profile.max_failures or _all_stopped(runs):
                return code if code >= 0 else 128 - code
            restarts += 1
            _write(f"sixfold: the driver was ended by {signal.Signals(-code).name}; restart {restarts}\n", outputs)


def _run_child(command: list[str], outputs: list[BinaryIO]) -> int:
    """Run the child to its end and pass on what it writes; who ends us ends it."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:

        def pass_on(number: int, _frame: object) -> None:
            child.send_signal(number)
            os._exit(128 + number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, pass_on)
        assert child.stdout is not None
        for line in child.stdout:
            _write(line.decode(errors="replace"), outputs)
        return child.wait()


def _write(line: str, outputs: list[BinaryIO]) -> None:
    for output in outputs:
        output.write(line.encode())
        output.flush()


def _all_stopped(runs: tuple[Path, ...]) -> bool:
    return all(Requests(run).read() == "stop" for run in runs)


def end_with_parent() -> None:
    """Have the kernel end this process when its parent is gone, however that ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _attempt(path: Path, order: Order, runs: tuple[Path, ...]) -> int:
    end_with_parent()  # nobody would answer for its ranks
    from sixfold.train.run_folder import RunFolder
    from sixfold_launchers.ray_train import TrainingFailedError, connect, train_run

    connect()
    failed = 0
    for run in runs:
        if Requests(run).read() == "stop":
            if read_outcome(run) != "finished":
                leave_outcome(run, "interrupted")
            continue
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
    sys.exit(main())
