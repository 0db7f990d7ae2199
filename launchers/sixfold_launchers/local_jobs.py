"""Jobs on this machine, detached from the terminal and kept in the same book as a cluster's.

A keeper process of its own session starts the ranks as ``sixfold run`` does, run after run for a sweep. Its number and
start time are the job's id on this "cluster": a later process that reuses the number is not taken for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # it ships no types

from sixfold.errors import Fault, SixfoldError, UserError
from sixfold.tracking.events import EVENTS, last_status
from sixfold.train.run_folder import RunFolder, held
from sixfold_launchers.contract import INTERRUPTED, JobRecord, JobSpec, JobStatus, State, Submission, leave_outcome
from sixfold_launchers.local import launch
from sixfold_launchers.logs import follow_files
from sixfold_launchers.profiles import LocalProfile
from sixfold_launchers.secrets import put_into_environment, resolve

JOB = "job.json"
ENDED_WITH = "exit_code"
KEEPER = "keeper"
_CANCEL, _REQUEUE = signal.SIGUSR2, signal.SIGUSR1
_CANCELLED = 128 + _CANCEL
_STATES: dict[int, State] = {0: "finished", INTERRUPTED: "interrupted", _CANCELLED: "cancelled"}


class LocalLauncher:
    """Starts a keeper for each job; the keeper starts the ranks."""

    def __init__(self, profile: LocalProfile) -> None:
        self.profile = profile
        self._read: dict[Path, int] = {}

    def render(self, spec: JobSpec) -> Submission:
        """The keeper's orders."""
        variables = dict(self.profile.environment) | {"SIXFOLD_JOB_ID": spec.job_id}
        path = spec.python_path()
        if path is not None:
            variables["PYTHONPATH"] = path
        orders = {
            "runs": [str(run.folder) for run in spec.runs],
            "directory": str(spec.directory),
            "ranks": self.profile.ranks,
            "max_restarts": self.profile.max_restarts,
            "environment": variables,
            "secrets": list(self.profile.secrets),
            "secrets_folder": self.profile.secrets_folder,
        }
        return Submission(
            files={JOB: json.dumps(orders, indent=2) + "\n"},
            command=(spec.python, "-m", "sixfold_launchers.local_jobs", str(spec.folder)),
            notes=(f"{self.profile.ranks} ranks on this machine",),
        )

    def check(self, spec: JobSpec) -> list[Fault]:
        """Nothing to ask but the secrets, which lie on this machine."""
        resolve(self.profile.secrets, self.profile.secrets_folder)
        return []

    def submit(self, spec: JobSpec, submission: Submission) -> str:
        """Start the keeper; its process outlives this one."""
        spec.logs.mkdir(parents=True, exist_ok=True)
        (spec.folder / ENDED_WITH).unlink(missing_ok=True)
        orders = json.loads((spec.folder / JOB).read_text())
        with (spec.logs / "local.out").open("ab") as log:
            keeper = subprocess.Popen(
                submission.command,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **orders["environment"]},
                cwd=spec.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        identity = f"{keeper.pid}@{psutil.Process(keeper.pid).create_time():.2f}"
        (spec.folder / KEEPER).write_text(identity)
        return identity

    def find(self, spec: JobSpec) -> str | None:
        """What the last start left in the job's folder."""
        with contextlib.suppress(FileNotFoundError):
            return (spec.folder / KEEPER).read_text()
        return None

    def status(self, job: JobRecord) -> JobStatus:
        """Running while the keeper does; then as the keeper left it."""
        if _keeper(job.cluster_id) is not None:
            return JobStatus(state="running", detail=f"process {(job.cluster_id or '').partition('@')[0]}")
        try:
            code = int((job.spec.folder / ENDED_WITH).read_text())
        except FileNotFoundError:
            return JobStatus(state="interrupted", detail="its keeper was killed, or the machine went down")
        return JobStatus(state=_STATES.get(code, "failed"), detail=f"exit code {code}")

    def logs(self, job: JobRecord, *, follow: bool) -> Iterator[str]:
        """The output of all ranks."""
        return follow_files(
            job.spec.logs, "*.out", (lambda: self.status(job).state) if follow else None, read=self._read
        )

    def cancel(self, job: JobRecord) -> None:
        """Have the ranks save and end."""
        keeper = _keeper(job.cluster_id)
        if keeper is None:
            raise UserError.of(f"job {job.job_id} does not run", fix="nothing to do")
        keeper.send_signal(_CANCEL)

    def requeue(self, job: JobRecord) -> str:
        """Start a job again that has ended, or that ends now."""
        keeper = _keeper(job.cluster_id)
        if keeper is not None:
            keeper.send_signal(_REQUEUE)
            with contextlib.suppress(psutil.TimeoutExpired):
                keeper.wait(timeout=600)
        return self.submit(job.spec, self.render(job.spec))


def _keeper(identity: str | None) -> psutil.Process | None:
    if identity is None:
        return None
    pid, _, started = identity.partition("@")
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(int(pid))
        if f"{process.create_time():.2f}" == started and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def main() -> None:
    """Keep the job in the folder named on the command line: start its ranks, and leave how they ended."""
    folder = Path(sys.argv[1])
    asked: list[int] = []

    def hear(number: int, _frame: object) -> None:
        asked.append(number)
        os.kill(os.getpid(), signal.SIGTERM)  # which the local launcher passes on to the ranks

    for number in (_CANCEL, _REQUEUE):
        signal.signal(number, hear)
    orders = json.loads((folder / JOB).read_text())
    code = 1
    try:
        put_into_environment(orders["secrets"], orders["secrets_folder"])
        code = _train(orders)
    except SixfoldError as error:
        sys.stderr.write(f"{error}\n")
        code = error.exit_code
    finally:
        if _CANCEL in asked and code == INTERRUPTED:
            code = _CANCELLED
        (folder / ENDED_WITH).write_text(f"{code}\n")
    sys.exit(code)


def _train(orders: dict[str, Any]) -> int:
    """Train the runs one after another; return the exit code of the first that does not finish, or 0."""
    for run in map(Path, orders["runs"]):
        folder = RunFolder(run)
        if (run / EVENTS).exists() and last_status(run) == "finished":
            continue  # an earlier attempt of a sweep came past it
        with held(folder) as lock:
            outcome = launch(run, ranks=orders["ranks"], max_restarts=orders["max_restarts"], inherited=(lock,))
        if outcome.exit_code:
            sys.stderr.write(f"{folder.failure(outcome.rank, outcome.exit_code)}\n")
            return outcome.exit_code
        status = last_status(run)
        if status is not None:
            leave_outcome(run, status)
        if status == "interrupted":
            return INTERRUPTED
    return 0


if __name__ == "__main__":
    main()
