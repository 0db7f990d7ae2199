"""Jobs on a real Ray of several nodes: same losses as locally, through kills, node failures, preemption and growth."""

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cluster_jobs import Held, attempts, logged_steps, losses, sixfold, wait_for, wait_for_attempt
from ray_runs import STEPS, TWELVE_LANES, Nodes
from sixfold.errors import EnvironmentFault
from sixfold_launchers import ray_cluster
from sixfold_launchers.ray_server import RayServer

TRAIN = (
    *TWELVE_LANES,
    f"train.steps={STEPS}",
    "checkpoint.every_steps=5",
    "tracking.type=mlflow",
    "tracking.system_metrics=false",
)
HERE = ("snapshot.policy=installed",)
PATIENCE_S = 300  # a job takes half a minute on a quiet machine
SECRET = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def nodes(book):
    """Three nodes with a CPU each, one of them the head; a test may take some away and must bring them back."""
    nodes = Nodes(ray_cluster.default_folder())
    try:
        nodes.bring_up(3)
        yield nodes
    except EnvironmentFault as fault:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no Ray: {fault}")
    finally:
        ray_cluster.down(nodes.folder)


@pytest.fixture(scope="module")
def submit_to_ray(submit, nodes):
    def submit_to_ray(minimum, maximum, settings=()):
        ranks = (f"ranks.minimum={minimum}", f"ranks.maximum={maximum}", "placement=SPREAD", "grow_interval_s=0.5")
        return submit("ray", *TRAIN, settings=(*HERE, *ranks, *settings))

    return submit_to_ray


@pytest.fixture(scope="module")
def here(submit):
    """The undisturbed run that all others are held to: two ranks of this machine."""
    job = submit("local", *TRAIN, settings=(*HERE, "ranks=2"))
    job.wait_until_finished(PATIENCE_S)
    return job


def mlflow_shape(job, directory):
    """A run's parameters by name, tags' names, and the steps of each metric in MLflow."""
    with sqlite3.connect(directory / "mlflow.db") as store:
        (uuid,) = store.execute("SELECT run_uuid FROM runs WHERE name = ?", (job.run.name,)).fetchone()
        names = {key for (key,) in store.execute("SELECT key FROM tags WHERE run_uuid = ?", (uuid,))}
        params = dict(store.execute("SELECT key, value FROM params WHERE run_uuid = ?", (uuid,)))
        points = store.execute(
            "SELECT key, step FROM metrics WHERE run_uuid = ? ORDER BY key, step", (uuid,)
        ).fetchall()
    return names, params, points


def test_same_losses_and_records_as_locally_and_no_secret_anywhere(
    nodes, submit_to_ray, here, workplace, tmp_path_factory
):
    secrets = tmp_path_factory.mktemp("secrets")
    (secrets / "STORE_PASSWORD").write_text(SECRET)
    (secrets / "STORE_PASSWORD").chmod(0o600)
    job = submit_to_ray(2, 2, settings=("secrets=[STORE_PASSWORD]", f"secrets_folder={secrets}"))
    rank, _ = nodes.wait_for_ranks(job, 2)
    job.wait_for_step(1, PATIENCE_S)
    assert f"STORE_PASSWORD={SECRET}".encode() not in Path(f"/proc/{rank.pid}/environ").read_bytes()
    job.wait_until_finished(PATIENCE_S)

    assert losses(job.run) == pytest.approx(losses(here.run), rel=1e-5)
    (names, params, points), (local_names, local_params, local_points) = (
        mlflow_shape(each, workplace) for each in (job, here)
    )
    assert params == local_params
    assert points == local_points
    assert {name for name in names ^ local_names if not name.startswith(("variable.", "version."))} == set()

    server = nodes.cluster.server
    assert SECRET not in json.dumps(server.job(job.cluster_id))
    for folder in (workplace, Path(nodes.cluster.temporary), nodes.folder.parent):  # the last holds the job book, too
        found = subprocess.run(["grep", "-r", "-l", SECRET, folder], capture_output=True, text=True, check=False)
        assert found.stdout == ""


def test_killed_rank_and_killed_driver_change_nothing(nodes, submit_to_ray, here):
    job = submit_to_ray(2, 2)
    ranks, (driver,) = nodes.wait_for_ranks(job, 2), nodes.drivers()
    job.wait_for_step(7, PATIENCE_S)
    os.kill(ranks[1].pid, signal.SIGKILL)
    wait_for_attempt(job, 2, step=4)
    os.kill(driver.pid, signal.SIGKILL)
    wait_for_attempt(job, 3)
    job.wait_until_finished(PATIENCE_S)

    assert losses(job.run) == losses(here.run)  # two ranks of one machine and of two nodes compute alike
    assert len(attempts(job.run)) == 3
    assert logged_steps(job.run) == list(range(1, STEPS + 1))
    wait_for(lambda: not nodes.ranks() + nodes.drivers(), "ranks outlive their job", 30, job)


def test_ranks_follow_the_cluster(nodes, submit_to_ray, here):
    nodes.bring_up(4)
    job = submit_to_ray(2, 4)
    four = nodes.wait_for_ranks(job, 4)
    lost = nodes.node_of(four[-1])
    job.wait_for_step(6, PATIENCE_S)
    nodes.kill(lost)

    three = nodes.wait_for_ranks(job, 3, other_than=four)
    leaving = nodes.node_of(three[-1])
    wait_for_attempt(job, 2, step=3)
    with Held(three):
        nodes.drain(leaving)
        before = max(losses(job.run))

    two = nodes.wait_for_ranks(job, 2, other_than=three)
    wait_for_attempt(job, 3)
    assert attempts(job.run)[2] >= before  # it saved where it stood
    with Held(two):
        nodes.kill(leaving)
        nodes.bring_up(3)
        before = max(losses(job.run))

    nodes.wait_for_ranks(job, 3, other_than=two)
    job.wait_until_finished(PATIENCE_S)
    assert attempts(job.run)[3] >= before
    assert len(attempts(job.run)) == 4
    assert losses(job.run) == pytest.approx(losses(here.run), rel=1e-5)
    assert logged_steps(job.run) == list(range(1, STEPS + 1))


def test_a_cancelled_job_has_saved_and_goes_on_when_requeued(nodes, submit_to_ray, here):
    job = submit_to_ray(2, 2)
    ranks = nodes.wait_for_ranks(job, 2)
    job.wait_for_step(7, PATIENCE_S)
    with Held(ranks):
        cancelling = subprocess.Popen([sys.executable, "-m", "sixfold.cli.main", "jobs", "cancel", job.id])
        wait_for((job.run / "request").exists, "nobody was asked to stop", 60, job)
    assert cancelling.wait(timeout=120) == 0
    assert job.state() == "cancelled"
    stopped_after = max(losses(job.run))
    assert stopped_after < STEPS
    sixfold("jobs", "requeue", job.id)
    job.wait_until_finished(PATIENCE_S)
    assert attempts(job.run)[1] == stopped_after
    assert losses(job.run) == losses(here.run)


def test_the_cluster_is_this_users_alone(nodes):
    cluster = nodes.bring_up(nodes.size)  # twice is once
    assert nodes.size == len(cluster.nodes)
    assert stat.S_IMODE(cluster.token_file.stat().st_mode) == 0o600
    with pytest.raises(EnvironmentFault, match="asks for a token"):
        RayServer(cluster.dashboard, None).nodes()
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "raylet"])
    try:
        assert bystander.pid not in ray_cluster.processes_of(cluster)
    finally:
        bystander.kill()
        bystander.wait()


def test_what_the_cluster_has_no_room_for_is_refused_with_the_fix(nodes, text, workplace):
    ranks = ("--with", "ranks.minimum=8", "--with", "ranks.maximum=8", "--with", "snapshot.policy=installed")
    done = sixfold(
        "submit", "lm/moe-smoke", "--to", "ray", f"data.path={text}", *ranks, "--dry-run",
        directory=workplace, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "has room for" in done.stderr
    assert "lower ranks.minimum" in done.stderr
    assert "Traceback" not in done.stderr
