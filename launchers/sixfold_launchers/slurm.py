"""Jobs on a Slurm cluster: the batch script of :mod:`sixfold_launchers.slurm_script`, submitted and answered for.

submitit reads the accounting database here. It does not submit: it ships pickled closures, has one rank act on its
signal from a handler that waits behind collectives, and counts timeouts where a long run has any number of them.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from sixfold.errors import Fault, UserError
from sixfold_launchers.contract import JobRecord, JobSpec, JobStatus, State, Submission, read_outcome
from sixfold_launchers.logs import follow_files
from sixfold_launchers.profiles import SlurmProfile
from sixfold_launchers.slurm_client import SlurmRefusal, Task, refusal_fault, slurm, state_of, tasks_named
from sixfold_launchers.slurm_script import SCRIPT, job_name, render

_ORDER: tuple[State, ...] = ("running", "pending", "interrupted", "failed", "cancelled", "lost", "finished")
"""The state of a sweep is the first of these that any of its runs has."""


class SlurmLauncher:
    """Trains by srun inside a batch job; a sweep is an array."""

    def __init__(self, profile: SlurmProfile) -> None:
        self.profile = profile
        self._read: dict[Path, int] = {}

    def render(self, spec: JobSpec) -> Submission:
        """The batch script, whole."""
        ranks = self.profile.ranks_allowed()[0]
        runs = f" each, {len(spec.runs)} runs in an array" if len(spec.runs) > 1 else ""
        return Submission(
            files={SCRIPT: render(self.profile, spec)},
            command=("sbatch", "--parsable", str(spec.folder / SCRIPT)),
            notes=(f"{ranks} ranks on {self.profile.nodes} nodes{runs}",),
        )

    def check(self, spec: JobSpec) -> list[Fault]:
        """Have Slurm itself judge the script, without submitting it."""
        return check_script(self.render(spec).files[SCRIPT])

    def submit(self, spec: JobSpec, submission: Submission) -> str:
        """Submit the script; the answer is Slurm's job id."""
        return submit_script(spec)

    def find(self, spec: JobSpec) -> str | None:
        """The newest job of this name."""
        return find_job(spec)

    def status(self, job: JobRecord) -> JobStatus:
        """The controller's word, else the accounting database's, else what the run folders say."""
        return job_status(job)

    def logs(self, job: JobRecord, *, follow: bool) -> Iterator[str]:
        """The batch jobs' output files, the ranks' output among it."""
        return follow_files(
            job.spec.logs, "*.out", (lambda: job_status(job).state) if follow else None, read=self._read
        )

    def cancel(self, job: JobRecord) -> None:
        """End it: ranks hear SIGTERM, and have Slurm's KillWait to save."""
        cancel_job(job)

    def requeue(self, job: JobRecord) -> str:
        """Save and start again if it runs; start again if it ended."""
        return requeue_job(job)


def check_script(script: str) -> list[Fault]:
    """Ask sbatch whether it would take a script.

    Raises:
        EnvironmentFault: no Slurm here, or its controller does not answer.
    """
    try:
        slurm("sbatch", "--test-only", text=script)
    except SlurmRefusal as refusal:
        return [refusal_fault(str(refusal), SCRIPT)]
    return []


def submit_script(spec: JobSpec) -> str:
    """Submit the script in a job's folder and return Slurm's id.

    Raises:
        UserError: Slurm refuses the script.
    """
    try:
        output = slurm("sbatch", "--parsable", str(spec.folder / SCRIPT))
    except SlurmRefusal as refusal:
        raise UserError(refusal_fault(str(refusal), spec.folder / SCRIPT)) from refusal
    return output.strip().split(";")[0]


def find_job(spec: JobSpec) -> str | None:
    """The id of the newest job with a spec's name; array tasks answer with their array's id."""
    tasks = tasks_named(job_name(spec))
    return tasks[-1].job_id.partition("_")[0] if tasks else None


def newest_tasks(job: JobRecord) -> list[Task]:
    """The newest job for each run: another submission of a run takes the place of the one before."""
    return list({task.index or 0: task for task in tasks_named(job_name(job.spec))}.values())


def job_status(job: JobRecord) -> JobStatus:
    """Merge what is known of every run of a job into one state."""
    tasks = newest_tasks(job)
    if not tasks:
        return _forgotten(job)
    states = [_state_of_run(job, task) for task in tasks]
    state = next(state for state in _ORDER if state in states)
    shown = tasks[states.index(state)]
    detail = shown.state.lower() + (f" ({shown.reason})" if shown.reason else "")
    if len(tasks) > 1:
        counts = {word: states.count(word) for word in _ORDER if word in states}
        detail = ", ".join(f"{count} {word}" for word, count in counts.items())
    nodes = tuple(sorted({task.nodes for task in tasks if task.nodes and state == "running"}))
    return JobStatus(state=state, detail=detail, restarts=sum(task.restarts for task in tasks), nodes=nodes)


def _state_of_run(job: JobRecord, task: Task) -> State:
    state = task.read_state()
    outcome = read_outcome(job.spec.runs[task.index or 0].folder)
    if state in ("failed", "cancelled", "interrupted") and outcome == "finished":
        return "finished"
    if state == "failed" and outcome == "interrupted":
        return "interrupted"
    return state


def _forgotten(job: JobRecord) -> JobStatus:
    """The state of a job that the controller forgot, as it does minutes after the end."""
    outcomes = {read_outcome(run.folder) for run in job.spec.runs}
    if outcomes == {"finished"}:
        return JobStatus(state="finished", detail="from the run folder", restarts=job.restarts)
    word = _accounted(job.cluster_id) if job.cluster_id is not None else None
    if word is not None:
        return JobStatus(state=state_of(word), detail=f"{word.lower()} (from accounting)", restarts=job.restarts)
    if outcomes == {"interrupted"}:
        return JobStatus(state="interrupted", detail="from the run folder", restarts=job.restarts)
    return JobStatus(state="lost", detail="the cluster has forgotten it; its log says more", restarts=job.restarts)


def _accounted(cluster_id: str) -> str | None:
    """Slurm's word for a past job, where the cluster keeps accounts and submitit is installed."""
    try:
        from submitit.slurm.slurm import SlurmInfoWatcher
    except ImportError:
        return None
    if shutil.which("sacct") is None:
        return None
    logging.getLogger("submitit").setLevel(logging.ERROR)  # a cluster without accounting is no cause for a warning
    word = SlurmInfoWatcher().get_state(cluster_id, mode="force").split(" ")[0]
    return None if word == "UNKNOWN" else word


def cancel_job(job: JobRecord) -> None:
    """Cancel every job of this name."""
    slurm("scancel", f"--name={job_name(job.spec)}")


def requeue_job(job: JobRecord) -> str:
    """Give a job another turn; the id stays unless Slurm has forgotten the job.

    Raises:
        UserError: the job waits already.
    """
    again: list[str] = []
    for task in newest_tasks(job):
        state = _state_of_run(job, task)
        if state == "running":
            slurm("scancel", "--batch", "--signal=USR1", task.job_id)
            again.append(task.job_id)
        elif state not in ("pending", "finished"):
            slurm("scontrol", "requeue", task.job_id)
            again.append(task.job_id)
    if again:
        return job.cluster_id or again[0].partition("_")[0]
    if newest_tasks(job):
        raise UserError.of(f"job {job.job_id} is {job.state}", fix="nothing to do: only a job that runs or ended early")
    return submit_script(job.spec)
