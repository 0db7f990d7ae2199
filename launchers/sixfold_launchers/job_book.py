"""The job book: every job this user submitted from this machine, durable and reconciled with the clusters' truth.

The book is one sqlite file, ``jobs.sqlite`` in ``$SIXFOLD_STATE`` (by default ``~/.local/state/sixfold``). A job is
written *before* it is submitted and confirmed after, so that a crash between the two leaves a record by which the
launcher finds the job on the cluster instead of submitting it twice.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sixfold.config.schema import nearest
from sixfold.errors import EnvironmentFault, SixfoldError, UserError
from sixfold_launchers.contract import JobRecord, JobSpec, JobStatus, RunSpec, launcher_of
from sixfold_launchers.profiles import profile_of

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    job_id TEXT PRIMARY KEY,
    key TEXT UNIQUE,
    state TEXT NOT NULL,
    submitted_s REAL NOT NULL,
    record TEXT NOT NULL
)
"""
SUBMISSION_TIMEOUT_S = 120.0
"""How long a submission may take before a job that its cluster does not know counts as never submitted."""


def state_folder() -> Path:
    """Where this user's book lies on this machine."""
    named = os.environ.get("SIXFOLD_STATE")
    return Path(named) if named else Path.home() / ".local" / "state" / "sixfold"


class JobBook:
    """Reads and writes the book; every change is one transaction, safe beside other processes.

    Raises:
        EnvironmentFault: the file cannot be made or written.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.path = (folder or state_folder()) / "jobs.sqlite"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as book:
                book.execute(_SCHEMA)
        except (OSError, sqlite3.OperationalError) as error:
            raise EnvironmentFault.of(
                f"the job book cannot be opened: {error}",
                where=str(self.path),
                fix="make the folder writable, or name another one in SIXFOLD_STATE",
            ) from error
        except sqlite3.Error as error:
            raise EnvironmentFault.of(
                f"the job book cannot be read: {error}",
                where=str(self.path),
                fix=f"move it away (mv {self.path} {self.path}.damaged): jobs go on, and their clusters know them",
            ) from error

    def begin(self, job: JobRecord) -> JobRecord | None:
        """Enter a job that is about to be submitted; return the job that already has its key, which then stands.

        Raises:
            UserError: the key belongs to a job that is not the same.
        """
        with self._open() as book:
            if job.key is not None and (known := self._by_key(book, job.key)) is not None:
                if known.digest != job.digest:
                    raise UserError.of(
                        f"the key {job.key!r} was used for a different submission, job {known.job_id}",
                        where="--key",
                        fix=f"use another key, or look at the job: sixfold jobs show {known.job_id}",
                    )
                return known
            book.execute(
                "INSERT INTO jobs VALUES (?, ?, ?, ?, ?)",
                (job.job_id, job.key, job.state, job.submitted_s, _to_json(job)),
            )
        return None

    def update(self, job: JobRecord) -> JobRecord:
        """Write a job that the book holds; return it with the time of writing."""
        job = replace(job, updated_s=time.time())
        with self._open() as book:
            book.execute(
                "UPDATE jobs SET state = ?, record = ? WHERE job_id = ?", (job.state, _to_json(job), job.job_id)
            )
        return job

    def forget(self, job_id: str) -> None:
        """Remove a job that the cluster refused: its key is free again."""
        with self._open() as book:
            book.execute("DELETE FROM jobs WHERE job_id = ?", (job_id,))

    def jobs(self) -> list[JobRecord]:
        """Every job, newest first.

        Raises:
            EnvironmentFault: an entry cannot be read; names it.
        """
        with self._open() as book:
            rows = book.execute("SELECT job_id, record FROM jobs ORDER BY submitted_s DESC, job_id DESC").fetchall()
        return [self._read(job_id, text) for job_id, text in rows]

    def find(self, reference: str) -> JobRecord:
        """Return the job with this id, key, cluster's id or an unambiguous beginning of its id.

        Raises:
            UserError: none or several answer to it.
        """
        jobs = self.jobs()
        exact = [job for job in jobs if reference in (job.job_id, job.key, job.cluster_id)]
        found = exact or [job for job in jobs if job.job_id.startswith(reference)]
        if len(found) == 1:
            return found[0]
        names = [job.job_id for job in found or jobs]
        suggestion = nearest(reference, names)
        raise UserError.of(
            f"{len(found)} jobs answer to {reference!r}" if found else f"there is no job {reference!r}",
            where=str(self.path),
            allowed=", ".join(names[:5]) or "none: no job was submitted from here",
            fix=f"did you mean `{suggestion}`?" if suggestion else "`sixfold jobs list` shows all of them",
        )

    def of_run(self, folder: Path) -> list[JobRecord]:
        """Every job that works, or worked, on a run folder; newest first."""
        return [job for job in self.jobs() if any(run.folder == folder for run in job.spec.runs)]

    def _by_key(self, book: sqlite3.Connection, key: str) -> JobRecord | None:
        row = book.execute("SELECT job_id, record FROM jobs WHERE key = ?", (key,)).fetchone()
        return None if row is None else self._read(*row)

    def _read(self, job_id: str, text: str) -> JobRecord:
        try:
            return _from_json(text)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise EnvironmentFault.of(
                f"the job book's entry of job {job_id} cannot be read: {str(error).splitlines()[0]}",
                where=str(self.path),
                fix=f"""remove it: sqlite3 {self.path} "DELETE FROM jobs WHERE job_id = '{job_id}'\"""",
            ) from error

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=30.0, isolation_level="IMMEDIATE")) as book, book:
            book.execute("BEGIN IMMEDIATE")
            yield book


def reconcile(book: JobBook, jobs: Sequence[JobRecord]) -> list[tuple[JobRecord, SixfoldError | None]]:
    """Ask the clusters about jobs that have not ended and write their answers down.

    Returns:
        Each job as it is now, with the fault that kept its cluster from answering, if any: a job on a cluster that is
        away keeps its last known state.
    """
    answers: list[tuple[JobRecord, SixfoldError | None]] = []
    for job in jobs:
        try:
            answers.append((_reconciled(book, job), None))
        except SixfoldError as fault:
            answers.append((job, fault))
    return answers


def _reconciled(book: JobBook, job: JobRecord) -> JobRecord:
    if job.ended:
        return job
    launcher = launcher_of(job.profile)
    if job.cluster_id is None:
        cluster_id = launcher.find(job.spec)
        if cluster_id is None:
            if time.time() - job.submitted_s < SUBMISSION_TIMEOUT_S:
                return job
            return book.update(replace(job, state="lost", detail="it was never seen on the cluster"))
        job = replace(job, cluster_id=cluster_id)
    return book.update(with_status(job, launcher.status(job)))


def with_status(job: JobRecord, status: JobStatus) -> JobRecord:
    """The job as the cluster now describes it."""
    return replace(job, state=status.state, detail=status.detail, restarts=status.restarts, nodes=status.nodes)


def _to_json(job: JobRecord) -> str:
    plain = {**vars(job), "profile": job.profile.model_dump(mode="json"), "spec": asdict(job.spec)}
    return json.dumps(plain, default=str)


def _from_json(text: str) -> JobRecord:
    plain = json.loads(text)
    return JobRecord(
        **{
            **plain,
            "profile": profile_of(plain["profile"]),
            "spec": _spec(plain["spec"]),
            "nodes": tuple(plain["nodes"]),
        }
    )


def _spec(plain: dict[str, Any]) -> JobSpec:
    runs = tuple(
        RunSpec(folder=Path(run["folder"]), recipe=run["recipe"], overrides=tuple(run["overrides"]))
        for run in plain["runs"]
    )
    code = None if plain["code"] is None else Path(plain["code"])
    paths = {"folder": Path(plain["folder"]), "directory": Path(plain["directory"]), "code": code}
    return JobSpec(**{**plain, **paths, "runs": runs})
