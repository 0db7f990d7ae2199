"""Runs an MLflow server on this machine's loopback over a store, and stops it with everything it started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.util import find_spec
from types import TracebackType

from sixfold.errors import EnvironmentFault, UserError
from sixfold.tracking.settings import sqlite_path

HOST = "127.0.0.1"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 3.0


class MLflowServer:
    """A server process over one store; a context manager that stops it.

    Raises:
        EnvironmentFault: MLflow is not installed.
        UserError: the port is taken.
    """

    def __init__(self, uri: str, port: int) -> None:
        if find_spec("mlflow") is None:
            raise EnvironmentFault.of("MLflow is not installed", fix="pip install 'sixfold[mlflow]'")
        if not is_free(port):
            raise UserError.of(
                f"port {port} is taken by another program",
                where="--port",
                fix="name another port, or leave --port out to take a free one",
            )
        self.address = f"http://{HOST}:{port}"
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process, closed in stop()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"],
            env=_environment(uri),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C reaches us only; its whole session is stopped below
        )

    def __enter__(self) -> MLflowServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._process.poll() is None

    def is_ready(self) -> bool:
        """Whether it answers.

        Raises:
            EnvironmentFault: the process has ended.
        """
        if not self.is_running:
            raise EnvironmentFault.of(f"the MLflow server has ended:\n{self._last_lines()}", where=self.address)
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=5.0) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Return when it answers.

        Raises:
            EnvironmentFault: it ended, or did not answer in time.
        """
        deadline_s = time.monotonic() + timeout_s
        while not self.is_ready():
            if time.monotonic() > deadline_s:
                raise EnvironmentFault.of(
                    f"the MLflow server did not answer within {timeout_s:.0f} s:\n{self._last_lines()}",
                    where=self.address,
                )
            time.sleep(0.1)

    def stop(self) -> None:
        """End the server and its children, gently first."""
        import psutil  # type: ignore[import-untyped]  # it ships no types

        with_children = [self._process.pid]
        if self.is_running:
            with_children += [child.pid for child in psutil.Process(self._process.pid).children(recursive=True)]
        processes = [psutil.Process(pid) for pid in with_children if psutil.pid_exists(pid)]
        _signal_group(self._process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S)
        for process in alive:
            process.kill()
        self._process.wait()
        self._output.close()

    def _last_lines(self) -> str:
        self._output.seek(0)
        return b"\n".join(self._output.read().splitlines()[-10:]).decode(errors="replace")


def is_free(port: int) -> bool:
    """Whether a server could listen on a loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _environment(uri: str) -> dict[str, str]:
    """The store goes by environment: a URI may hold a password, and command lines are visible to everyone."""
    from sixfold.tracking.mlflow import QUIET

    environment = {**os.environ, **QUIET, "MLFLOW_BACKEND_STORE_URI": uri}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    database = sqlite_path(uri)
    if database is not None:  # where tracked runs keep theirs, instead of a folder in whatever place this is started
        environment["MLFLOW_ARTIFACTS_DESTINATION"] = str(database.with_name(f"{database.name}.artifacts"))
    return environment


def _signal_group(leader: int, number: signal.Signals) -> None:
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return
