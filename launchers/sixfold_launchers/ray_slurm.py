"""Ray inside a Slurm allocation: one step starts Ray on every node, and ends when the driver or any part of Ray does.

``ray symmetric-run`` does the like, with a fixed wait for nodes, an exit code 0 for a start that failed, no way to pass
signals on, and an end that stops every Ray of a node; hence a script and node keepers of our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sixfold.errors import Fault, UserError
from sixfold.recipe.load import load_recipe
from sixfold_launchers.contract import REQUEST, JobRecord, JobSpec, JobStatus, Submission
from sixfold_launchers.logs import follow_files
from sixfold_launchers.profiles import SlurmRayProfile
from sixfold_launchers.ray_order import ORDER, order_of, rank_numbers
from sixfold_launchers.slurm import cancel_job, check_script, find_job, job_status, requeue_job, submit_script
from sixfold_launchers.slurm_script import SCRIPT, array, script

NODE_MODULE = "sixfold_launchers.ray_node"


class SlurmRayLauncher:
    """Trains by Ray Train inside a batch job; a sweep is an array whose tasks have a Ray each."""

    def __init__(self, profile: SlurmRayProfile) -> None:
        self.profile = profile
        self._read: dict[Path, int] = {}

    def render(self, spec: JobSpec) -> Submission:
        """The batch script and the order it works through."""
        ranks = self.profile.ranks
        runs = f"; {len(spec.runs)} runs in an array" if len(spec.runs) > 1 else ""
        return Submission(
            files={SCRIPT: render(self.profile, spec), ORDER: order_of(spec, self.profile).dump()},
            command=("sbatch", "--parsable", str(spec.folder / SCRIPT)),
            notes=(f"{ranks.minimum} to {ranks.maximum} ranks by Ray on {self.profile.nodes} nodes{runs}",),
        )

    def check(self, spec: JobSpec) -> list[Fault]:
        """Check that the ranks fit the allocation and the recipes, and have Slurm judge the script."""
        faults = [*room_faults(self.profile)]
        for run in spec.runs:
            recipe = run.folder / "recipe.yaml"
            if recipe.exists():
                try:
                    rank_numbers(self.profile, load_recipe(str(recipe)).recipe.data.lane_count)
                except UserError as error:
                    faults.extend(error.faults)
        return [*faults, *check_script(render(self.profile, spec))]

    def submit(self, spec: JobSpec, submission: Submission) -> str:
        """Submit the script; the answer is Slurm's job id."""
        return submit_script(spec)

    def find(self, spec: JobSpec) -> str | None:
        """The newest job of this name."""
        return find_job(spec)

    def status(self, job: JobRecord) -> JobStatus:
        """Slurm's word."""
        return job_status(job)

    def logs(self, job: JobRecord, *, follow: bool) -> Iterator[str]:
        """The batch jobs' output, driver and ranks among it."""
        return follow_files(
            job.spec.logs, "*.out", (lambda: job_status(job).state) if follow else None, read=self._read
        )

    def cancel(self, job: JobRecord) -> None:
        """End it."""
        cancel_job(job)

    def requeue(self, job: JobRecord) -> str:
        """Save and start again if it runs; start again if it ended."""
        return requeue_job(job)


def render(profile: SlurmRayProfile, spec: JobSpec) -> str:
    """The batch script: one task a node keeps Ray there."""
    return script(
        profile,
        spec,
        own=[
            ("ntasks-per-node", "1"),
            ("cpus-per-task", str(profile.cpus_per_node)),
            ("array", array(None, spec)),
        ],
        cpus_per_task=profile.cpus_per_node,
        worker=[spec.python, "-m", NODE_MODULE, str(spec.folder / ORDER)],
        arguments=(),  # the order names the secrets; ranks read them on their nodes
        max_restarts=0,  # Ray starts ranks again; a Ray that died ends the allocation
        fruitless_turns=2,
        tell=f'printf stop > "$run/{REQUEST}"',  # a signal to the step would end Ray's own processes
    )


def room_faults(profile: SlurmRayProfile) -> Iterator[Fault]:
    """Say when the allocation has no room for the fewest ranks that the profile allows."""
    by_cpus = profile.cpus_per_node // profile.cpus_per_rank
    a_node = min(by_cpus, profile.gpus_per_node // profile.gpus_per_rank) if profile.gpus_per_rank else by_cpus
    if profile.nodes * a_node < profile.ranks.minimum:
        yield Fault(
            what=f"{profile.nodes} nodes have room for {profile.nodes * a_node} ranks, "
            f"the profile wants at least {profile.ranks.minimum}",
            where="ranks.minimum",
            allowed=f"a node has {profile.cpus_per_node} CPUs and {profile.gpus_per_node} GPUs for Ray, a rank takes "
            f"{profile.cpus_per_rank} and {profile.gpus_per_rank}",
            fix="raise nodes, cpus_per_node or gpus_per_node, or lower ranks.minimum",
        )
