"""Jobs on a standing Ray cluster: an order and a code package, submitted to its job server and answered for.

A sweep is one job whose driver trains the runs one after the other, each on as many ranks as the profile allows.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sixfold.errors import EnvironmentFault, Fault, UserError
from sixfold.recipe.load import load_recipe
from sixfold_launchers import ray_cluster
from sixfold_launchers.contract import JobRecord, JobSpec, JobStatus, State, Submission, read_outcome
from sixfold_launchers.logs import follow_files
from sixfold_launchers.profiles import RayProfile
from sixfold_launchers.ray_order import DRIVER_MODULE, ORDER, Requests, order_of, rank_numbers
from sixfold_launchers.ray_server import RayServer

JOB = "ray-job.json"
LOG = "ray.out"
_SAVE_TIMEOUT_S = 60.0
_STATES: dict[str, State] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "finished",
    "FAILED": "failed",
    "STOPPED": "cancelled",
}


class RayLauncher:
    """Trains by Ray Train on a cluster that stands already."""

    def __init__(self, profile: RayProfile) -> None:
        self.profile = profile
        self._read: dict[Path, int] = {}

    def render(self, spec: JobSpec) -> Submission:
        """The order and the job's specification."""
        ranks = self.profile.ranks
        runs = f"; {len(spec.runs)} runs, one after the other" if len(spec.runs) > 1 else ""
        job = job_specification(spec, self.profile)
        return Submission(
            files={ORDER: order_of(spec, self.profile).dump(), JOB: json.dumps(job, indent=2) + "\n"},
            command=_command(job, self.profile.address or "auto"),
            notes=(f"{ranks.minimum} to {ranks.maximum} ranks, as many as the cluster has room for{runs}",),
        )

    def check(self, spec: JobSpec) -> list[Fault]:
        """Ask the cluster for its room, and the recipes for the numbers of ranks they can use."""
        faults: list[Fault] = []
        for run in spec.runs:
            recipe = run.folder / "recipe.yaml"
            if recipe.exists():
                try:
                    rank_numbers(self.profile, load_recipe(str(recipe)).recipe.data.lane_count)
                except UserError as error:
                    faults.extend(error.faults)
        return faults + room_faults(self.profile, self._server().nodes())

    def submit(self, spec: JobSpec, submission: Submission) -> str:
        """Upload the snapshot, then submit."""
        return self._submit(spec, json.loads(submission.files[JOB]))

    def find(self, spec: JobSpec) -> str | None:
        """The newest of the job's submissions."""
        jobs = [job for job in self._server().jobs() if _is_of(spec.job_id, job.get("submission_id") or "")]
        newest = max(jobs, key=lambda job: job.get("start_time") or 0, default=None)
        return None if newest is None else str(newest["submission_id"])

    def status(self, job: JobRecord) -> JobStatus:
        """The job server's word, and for ended jobs the run folders'."""
        found = self._server().job(job.confirmed_id)
        outcomes = {read_outcome(run.folder) for run in job.spec.runs}
        if found is None:
            state: State = "finished" if outcomes == {"finished"} else "lost"
            return JobStatus(state=state, detail="the cluster has forgotten it")
        state = _STATES[found["status"]]
        if state == "finished" and outcomes != {"finished"}:
            stopped = any(Requests(run.folder).read() == "stop" for run in job.spec.runs)
            state = "cancelled" if stopped else "interrupted"
        return JobStatus(state=state, detail=_last_line(found.get("message") or ""))

    def logs(self, job: JobRecord, *, follow: bool) -> Iterator[str]:
        """What driver and ranks wrote, from the job's folder: it outlives the cluster."""
        return follow_files(
            job.spec.logs, "*.out", (lambda: self.status(job).state) if follow else None, read=self._read
        )

    def cancel(self, job: JobRecord) -> None:
        """Have the ranks save and end, within a minute; then end what is left."""
        submission = job.confirmed_id
        for run in job.spec.runs:
            Requests(run.folder).make("stop")
        deadline_s = time.monotonic() + _SAVE_TIMEOUT_S
        while self.status(job).state == "running" and time.monotonic() < deadline_s:
            time.sleep(0.5)
        if self.status(job).state in ("pending", "running"):
            self._server().stop(submission)

    def requeue(self, job: JobRecord) -> str:
        """Have running ranks save and start again; submit an ended job once more, under the next id.

        Raises:
            UserError: the job is finished, or waits already.
        """
        submission = job.confirmed_id
        requests, state = [Requests(run.folder) for run in job.spec.runs], self.status(job).state
        if state == "running":
            for each in requests:
                each.make("regroup")
            return submission
        if state in ("finished", "pending"):
            raise UserError.of(f"job {job.job_id} is {state}", fix="nothing to do: only others can start again")
        for each in requests:
            each.clear("stop")
        specification = json.loads((job.spec.folder / JOB).read_text())
        return self._submit(job.spec, specification | {"submission_id": _next_id(job.spec.job_id, submission)})

    def _submit(self, spec: JobSpec, job: dict[str, Any]) -> str:
        server = self._server()
        spec.logs.mkdir(parents=True, exist_ok=True)
        if spec.code is not None:
            job = job | {"runtime_env": job["runtime_env"] | {"working_dir": server.upload(spec.code)}}
        return server.submit(job)

    def _server(self) -> RayServer:
        return server_of(self.profile)


def server_of(profile: RayProfile) -> RayServer:
    """The cluster that a profile names; by default the one of ``sixfold ray up``.

    Raises:
        EnvironmentFault: the profile names none, and none is up.
    """
    if profile.address is not None:
        named = profile.token_file or os.environ.get("RAY_AUTH_TOKEN_PATH")
        default = Path("~/.ray/auth_token").expanduser()
        token = Path(named).expanduser() if named else (default if default.exists() else None)
        return RayServer(profile.address, token)
    cluster = ray_cluster.find(ray_cluster.default_folder())
    if cluster is None:
        raise EnvironmentFault.of(
            "the profile names no Ray cluster, and none is up on this machine",
            where="address",
            fix="run `sixfold ray up --nodes 2`, or name a cluster: address=http://HEAD:8265",
        )
    return cluster.server


def job_specification(spec: JobSpec, profile: RayProfile) -> dict[str, Any]:
    """What the job server is sent, but for the snapshot's folder in place of the uploaded package.

    No secret is in it, and no name of one: everyone who sees the dashboard sees a job's runtime environment. Names are
    in the order, values are read on the nodes.
    """
    variables = dict(profile.environment)
    runtime_env: dict[str, Any] = {"env_vars": variables}
    if spec.code is not None:
        runtime_env["working_dir"] = str(spec.code)
        # Relative to each node's own copy of the package, which drivers and ranks start in.
        variables["PYTHONPATH"] = "platform:launchers:data_pipelines"
    return {
        "submission_id": spec.job_id,
        "entrypoint": shlex.join(
            [spec.python, "-m", DRIVER_MODULE, str(spec.folder / ORDER), "--log", str(spec.logs / LOG)]
        ),
        "runtime_env": runtime_env,
        "metadata": {"recipe": ", ".join(dict.fromkeys(run.recipe for run in spec.runs))},
    }


def room_faults(profile: RayProfile, nodes: list[dict[str, Any]]) -> list[Fault]:
    """Say what the cluster lacks for the fewest ranks that the profile allows."""
    needs = {"CPU": profile.cpus_per_rank, "GPU": profile.gpus_per_rank}
    totals = [node.get("resources_total") or {} for node in nodes]
    room = sum(
        int(min(total.get(name, 0.0) // amount for name, amount in needs.items() if amount > 0)) for total in totals
    )
    if room >= profile.ranks.minimum:
        return []
    has = ", ".join(f"{sum(total.get(name, 0.0) for total in totals):.0f} {name}s" for name in needs)
    return [
        Fault(
            what=f"the cluster has room for {room} ranks, the profile wants at least {profile.ranks.minimum}",
            where="ranks.minimum",
            allowed=f"{len(nodes)} nodes with {has} in all; a rank takes {needs['CPU']} CPUs and {needs['GPU']} GPUs",
            fix="lower ranks.minimum or what a rank takes, or add nodes (here: `sixfold ray up --nodes N`)",
        )
    ]


def _command(job: dict[str, Any], address: str) -> tuple[str, ...]:
    options = ["--address", address, "--submission-id", job["submission_id"]]
    runtime_env = json.dumps(job["runtime_env"])
    return ("ray", "job", "submit", *options, "--runtime-env-json", runtime_env, "--", *shlex.split(job["entrypoint"]))


def _is_of(job_id: str, submission_id: str) -> bool:
    """Whether a submission is one of a job's: the first has the job's id, others ``-again-N`` behind it."""
    rest = submission_id.removeprefix(job_id)
    return submission_id.startswith(job_id) and (not rest or rest.startswith("-again-"))


def _next_id(job_id: str, last: str) -> str:
    number = int(last.rpartition("-again-")[2]) if "-again-" in last else 0
    return f"{job_id}-again-{number + 1}"


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
