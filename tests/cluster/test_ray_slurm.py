"""Ray inside a real Slurm allocation of two nodes: same losses as locally, and no part of it outlives the job."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster_jobs import (
    attempts,
    command_of,
    logged_steps,
    losses,
    processes_naming,
    processes_of_sessions,
    session_of,
    wait_for,
    wait_for_attempt,
)
from ray_runs import STEPS, TWELVE_LANES

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


def folders(job):
    """Ray's folders of a job on this host."""
    return list(Path("/tmp").glob(f"sfray-*-{job.cluster_id}-*"))


def processes(job):
    """Processes that name one of them."""
    return [process for folder in folders(job) for process in processes_naming(folder)]


def leftovers(job):
    """What Ray left of a job on this host: processes and folders."""
    return [command_of(process) for process in processes(job)] + folders(job)


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
    raylets = [each for each in processes(job) if "/raylet/raylet" in command_of(each)]
    assert len(raylets) == 2
    # A job that has saved nothing yet would only repeat what ended it, and is not requeued.
    wait_for((job.run / "checkpoints/latest").exists, "nothing was saved", PATIENCE_S, job)
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


def test_a_ray_whose_keeper_is_killed_leaves_no_process(tmp_path):
    """What Slurm does in the end to a step that does not go by itself, and a power failure at once."""
    keeper = subprocess.Popen([sys.executable, "-c", KEEPER, tmp_path], env={**os.environ, "SLURM_JOB_ID": "1"})
    folder = Path(f"/tmp/sfray-test-{keeper.pid}")
    try:
        wait_for(lambda: processes_naming(f"{folder}/session"), "no raylet came up", PATIENCE_S)
        sessions = [session_of(process) for process in processes_naming(folder)]
        keeper.kill()
        keeper.wait()
        wait_for(lambda: not processes_of_sessions(sessions), "Ray outlives its keeper", PATIENCE_S)
    finally:
        keeper.kill()
        shutil.rmtree(folder, ignore_errors=True)


KEEPER = """
import os, sys, time
from pathlib import Path
from sixfold_launchers.profile_files import load_profile
from sixfold_launchers.ray_cluster import write_token
from sixfold_launchers.ray_node import Meeting, Place, Ray, head_arguments, own_address
place = Place(job=os.getpid(), attempt=0, node=0, nodes=1)
meeting = Meeting(Path(sys.argv[1]), place)
write_token(meeting.token)
arguments = head_arguments(place, load_profile("slurm-ray").profile, own_address())
Ray([f"--temp-dir=/tmp/sfray-test-{os.getpid()}" if "temp-dir" in each else each for each in arguments], meeting)
time.sleep(1000)
"""
