"""What a launcher is: it renders a job purely, submits it thinly, and answers for it afterwards.

A launcher plugs in by three lines: a profile class in :mod:`sixfold_launchers.profiles` names it as its
``implementation`` (``"sixfold_launchers.ray_jobs:RayLauncher"``), the profile class joins ``KINDS`` there, and the
launcher's constructor takes that profile. ``launcher_of(profile)`` builds it; the command, the job book, the code
snapshot and the secrets are shared by all launchers:

* ``sixfold submit`` makes a :class:`JobSpec` (job id, folders, runs, code), calls ``render`` (pure: same spec, same
  text), ``check`` (asks the cluster, changes nothing), writes ``Submission.files`` into the job's folder, records the
  job in the book as ``submitting``, calls ``submit`` and records the cluster's id;
* every rank ends up in ``sixfold.train.worker`` on ``spec.runs[i].folder``, with RANK, WORLD_SIZE, MASTER_ADDR,
  MASTER_PORT and LOCAL_RANK set, ``spec.code`` first on PYTHONPATH, and the profile's secrets put into its environment
  *inside the rank's process* by :func:`sixfold_launchers.secrets.resolve`;
* when training ends, rank 0 (or the driver) calls :func:`leave_outcome`; what stands outside Python reads that file;
* ``status`` answers with the cluster's truth; :func:`sixfold_launchers.job_book.reconcile` merges it into the book.

Failures a user can act on are raised as :mod:`sixfold.errors` classes: ``UserError`` for what the profile asks,
``EnvironmentFault`` for a cluster that does not answer.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from sixfold.errors import Fault, UserError
from sixfold_launchers.profiles import Profile

State = Literal["submitting", "pending", "running", "finished", "interrupted", "failed", "cancelled", "lost"]
"""``interrupted``: saved and ended, to be requeued. ``lost``: the cluster no longer knows a job that had not ended."""

ENDED: frozenset[State] = frozenset({"finished", "failed", "cancelled", "lost"})
"""States that a job does not leave by itself."""

INTERRUPTED = 75
"""Exit code of a job that saved and ended before its last step (EX_TEMPFAIL of sysexits.h): requeue it."""

OUTCOME = "outcome"
"""File in a run folder with how its last attempt ended (``finished``, ``interrupted``), for shell scripts to read."""

REQUEST = "request"
"""File in a run folder by which ranks that hear no signals (Ray's) are asked to save and end."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run of a job.

    Attributes:
        folder: absolute run folder, which holds ``recipe.yaml`` and ``run.json`` when the job starts.
        recipe: the recipe's name.
        overrides: what a sweep sets for this run, for people to read.
    """

    folder: Path
    recipe: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What to submit; everything that ``render`` may depend on besides the profile.

    Attributes:
        job_id: our own id, unique in the book and usable as a name on any cluster (``[a-z0-9-]``).
        folder: absolute folder of the job: the submission's files, logs. Every node sees it.
        runs: one run, or the runs of a sweep in array order.
        directory: absolute working directory of every rank: paths in recipes are relative to it.
        python: absolute interpreter on the nodes.
        code: absolute folder of the code snapshot; None runs the installed package.
    """

    job_id: str
    folder: Path
    runs: tuple[RunSpec, ...]
    directory: Path
    python: str
    code: Path | None = None

    @property
    def logs(self) -> Path:
        """Folder of the job's log files."""
        return self.folder / "logs"

    def python_path(self) -> str | None:
        """PYTHONPATH that puts the snapshot's source roots before anything installed."""
        if self.code is None:
            return None
        return ":".join(str(self.code / root) for root in ("platform", "launchers", "data_pipelines"))


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Exactly what is submitted.

    Attributes:
        files: text by file name, written into the job's folder before submission (``job.sbatch``, ``job.json``).
        command: the command (or its equivalent) that submits, for people to read and repeat.
        notes: facts that a dry run adds: ranks, nodes, what is not shipped.
    """

    files: Mapping[str, str]
    command: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """What ``--dry-run`` prints."""
        parts = [f"# {name}\n{content.rstrip()}\n" for name, content in self.files.items()]
        return "\n".join([*parts, f"# submitted by\n{shlex.join(self.command)}"])


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """The cluster's view of a job.

    Attributes:
        state: of the whole job; a sweep is running while any of its runs is, and failed if any of them failed.
        detail: the scheduler's own words: reason, nodes, exit code.
        restarts: how often the scheduler or launcher has started the job again.
        nodes: where it runs.
    """

    state: State
    detail: str = ""
    restarts: int = 0
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A job as the book knows it.

    Attributes:
        key: what makes a submission idempotent; None when the user gave none.
        digest: of what was submitted; the same key with another digest is refused.
        cluster_id: the scheduler's id; None while the submission has not been confirmed.
        profile: the profile as it was at submission.
        updated_s: when ``state`` was last reconciled, seconds since the epoch.
    """

    job_id: str
    key: str | None
    digest: str
    kind: str
    cluster_id: str | None
    profile_name: str
    profile: Profile
    spec: JobSpec
    state: State
    detail: str = ""
    restarts: int = 0
    submitted_s: float = 0.0
    updated_s: float = 0.0
    nodes: tuple[str, ...] = field(default=())

    @property
    def ended(self) -> bool:
        """Whether the job will not move by itself any more."""
        return self.state in ENDED

    @property
    def confirmed_id(self) -> str:
        """The scheduler's id.

        Raises:
            UserError: the submission has not been confirmed.
        """
        if self.cluster_id is None:
            raise UserError.of(
                f"job {self.job_id} is not known to have reached its cluster",
                where=self.profile_name,
                fix="`sixfold jobs list` asks the cluster, and calls the job lost if it was never seen there; then "
                "submit it again",
            )
        return self.cluster_id


class Launcher(Protocol):
    """Runs jobs on one kind of cluster; built from the profile that names it."""

    def render(self, spec: JobSpec) -> Submission:
        """Say exactly what would be submitted; pure, so that a dry run shows what a submission does."""
        ...

    def check(self, spec: JobSpec) -> list[Fault]:
        """Ask the cluster whether it would take the job; changes nothing.

        Raises:
            EnvironmentFault: the cluster does not answer, or its client is not installed here.
        """
        ...

    def submit(self, spec: JobSpec, submission: Submission) -> str:
        """Submit what :meth:`render` made, its files lying in ``spec.folder``; return the cluster's id."""
        ...

    def find(self, spec: JobSpec) -> str | None:
        """Return the cluster's id of a job that was submitted under ``spec.job_id``; None if there is none.

        Answers for a submission whose confirmation was lost between the cluster and the book.
        """
        ...

    def status(self, job: JobRecord) -> JobStatus:
        """Return the cluster's truth of a job with a cluster id."""
        ...

    def logs(self, job: JobRecord, *, follow: bool) -> Iterator[str]:
        """Yield the job's log, in pieces as they were written; with ``follow`` until it has ended or is interrupted.

        Another call on the same launcher goes on where the last one stopped.
        """
        ...

    def cancel(self, job: JobRecord) -> None:
        """End the job; its ranks save at the next step boundary where the cluster grants them time."""
        ...

    def requeue(self, job: JobRecord) -> str:
        """Start the job again (now, or after it has saved); return the cluster's id, which may be a new one."""
        ...


def launcher_of(profile: Profile) -> Launcher:
    """Import and build the launcher that a profile names."""
    launcher: Launcher = profile.load()(profile)
    return launcher


def leave_outcome(run_folder: Path, status: str) -> None:
    """Leave how an attempt ended where a batch script reads it without Python."""
    path = run_folder / OUTCOME
    temporary = path.with_name(f".{OUTCOME}.{os.getpid()}")
    temporary.write_text(f"{status}\n")
    temporary.replace(path)


def read_outcome(run_folder: Path) -> str | None:
    """Return how the last attempt ended; None while it runs or when it left nothing."""
    try:
        return (run_folder / OUTCOME).read_text().strip()
    except FileNotFoundError:
        return None


def port_of(job_id: int, attempt: int = 0, *, offset: int = 0) -> int:
    """A port that jobs of one machine share only by bad luck: from the job's number, below the ephemeral range.

    Jobs get 16 ports each (``offset`` below 16), spread over 10000 to 29999; another attempt gets others, since the
    last one's may still be in TIME_WAIT.
    """
    assert 0 <= offset < 16
    return 10000 + (job_id + 131 * attempt) % 1250 * 16 + offset
