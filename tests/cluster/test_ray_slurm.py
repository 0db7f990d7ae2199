"""Ray inside a real Slurm allocation of two nodes: same losses as locally, and no part of it outlives the job."""

import os
import signal
from pathlib import Path

import pytest

from cluster_jobs import attempts, command_of, logged_steps, losses, processes_naming, wait_for
from ray_runs import STEPS, TWELVE_LANES, wait_for_attempt

TRAIN = (
    *TWELVE_LANES,
    f"train.steps={STEPS}",
    "checkpoint.every_steps=5",
    "tracking.type=mlflow",
    "tracking.system_metrics=false",
)
HERE = ("snapshot.policy=installed",)
PATIENCE_S = 300  # a job takes half a minute on a quiet machine


@pytest.fixture(scope="module")
def here(submit):
    """The undisturbed run that all others are held to: two ranks of this machine."""
    job = submit("local", *TRAIN, settings=(*HERE, "ranks=2"))
    job.wait_until_finished(PATIENCE_S)
    return job


@pytest.fixture(scope="module")
def submit_to_slurm_ray(submit, slurm_cluster):
    def submit_to_slurm_ray():
        ranks = ("nodes=2", "ranks.minimum=2", "ranks.maximum=2", "placement=STRICT_SPREAD")
        return submit("slurm-ray", *TRAIN, settings=(*HERE, *ranks))

    return submit_to_slurm_ray


def leftovers(job):
    """What Ray left of a job on this host: processes and folders."""
    name = f"/tmp/sfray-{job.cluster_id}-"
    return [command_of(process) for process in processes_naming(name)] + list(Path("/tmp").glob(f"{Path(name).name}*"))


def test_ray_inside_slurm_trains_what_this_machine_trains(slurm_cluster, submit_to_slurm_ray, here):
    job = submit_to_slurm_ray()
    job.wait_for_step(3, PATIENCE_S)
    (token,) = job.run.glob(".ray-*-token")
    assert token.stat().st_mode & 0o777 == 0o600
    job.wait_until_finished(PATIENCE_S)
    assert losses(job.run) == pytest.approx(losses(here.run), rel=1e-5)
    wait_for(lambda: job.state() == "finished", "Slurm did not end the job", 60, job)
    wait_for(lambda: leftovers(job) == [], "Ray outlives its job", 30, job)
    assert not token.exists()


def test_a_dead_raylet_and_a_preemption_cost_nothing(slurm_cluster, submit_to_slurm_ray, here):
    job = submit_to_slurm_ray()
    job.wait_for_step(1, PATIENCE_S)
    raylets = [
        each for each in processes_naming(f"/tmp/sfray-{job.cluster_id}-") if "/raylet/raylet" in command_of(each)
    ]
    assert len(raylets) == 2
    job.wait_for_step(7, PATIENCE_S)
    os.kill(raylets[-1].pid, signal.SIGKILL)
    wait_for(lambda: slurm_cluster.start_now(job.cluster_id), "the job was not requeued", 120, job)

    wait_for_attempt(job, 2, step=2, timeout=PATIENCE_S)
    slurm_cluster("scancel", "--batch", "--signal=USR1", job.cluster_id)
    wait_for(lambda: slurm_cluster.start_now(job.cluster_id), "the job was not requeued", 120, job)
    stopped_after = max(losses(job.run))
    wait_for_attempt(job, 3, timeout=PATIENCE_S)
    assert attempts(job.run)[2] == stopped_after, "a preempted run saves where it stands"
    job.wait_until_finished(PATIENCE_S)

    assert losses(job.run) == losses(here.run)
    assert logged_steps(job.run) == list(range(1, STEPS + 1))
    wait_for(slurm_cluster.is_idle, "an allocation is held", 60, job)
    wait_for(lambda: leftovers(job) == [], "Ray outlives its job", 30, job)
