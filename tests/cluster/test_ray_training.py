"""Jobs on a real Ray of several nodes train what this machine trains, whatever is killed, drained or cancelled."""

import stat
import subprocess
import sys

import pytest

from cluster_jobs import (
    PATIENCE_S,
    REFERENCE,
    STEPS,
    Held,
    attempts,
    logged_steps,
    losses,
    mirrored,
    sixfold,
    wait_for,
    wait_for_attempt,
)
from sixfold.errors import EnvironmentFault
from sixfold_launchers import ray_cluster
from sixfold_launchers.ray_server import RayServer


@pytest.fixture
def submit_to_ray(submit, nodes):
    def submit_to_ray(minimum, maximum):
        ranks = (f"ranks.minimum={minimum}", f"ranks.maximum={maximum}", "placement=SPREAD", "grow_interval_s=0.5")
        return submit("ray", *REFERENCE, settings=("snapshot.policy=installed", "max_failures=9", *ranks))

    return submit_to_ray


def test_whatever_happens_to_a_job_it_ends_as_if_nothing_had(nodes, submit_to_ray, reference, workplace):
    """A rank, the driver and a raylet are killed, two nodes are drained, then the job itself is cancelled."""
    job = submit_to_ray(2, 2)
    ranks, lost, last, held_at = [], None, None, 0
    for turn, event in enumerate((kill_a_rank, kill_the_driver, kill_a_raylet, drain, drain, None), start=1):
        ranks = nodes.wait_for_ranks(job, 2, other_than=ranks)
        wait_for_attempt(job, turn, step=3)
        with Held(ranks):
            if last is drain:
                assert held_at <= attempts(job.run)[turn - 1] <= held_at + 2, "it saved where it stood"
            if lost is not None:
                nodes.kill(lost)
                nodes.bring_up(3)
            if event is not None:
                held_at = max(losses(job.run))
                lost, last = event(nodes, ranks), event
                continue
            cancelling = subprocess.Popen([sys.executable, "-m", "sixfold.cli.main", "jobs", "cancel", job.id])
            wait_for((job.run / "request").exists, "nobody was asked to stop", PATIENCE_S, job)
    assert cancelling.wait(PATIENCE_S) == 0
    assert job.state() == "cancelled"
    stopped_after = max(losses(job.run))
    sixfold("jobs", "requeue", job.id)
    job.wait_until_finished()

    assert attempts(job.run)[6:] == [stopped_after]
    assert losses(job.run) == losses(reference.run)  # two ranks of one machine and of two nodes compute alike
    assert logged_steps(job.run) == list(range(1, STEPS + 1))
    assert mirrored(job.run, workplace)["points"]["train/loss"] == list(range(1, STEPS + 1)), "no point twice"
    wait_for(lambda: not nodes.ranks() + nodes.drivers(), "ranks outlive their job", PATIENCE_S, job)


def test_ranks_follow_the_cluster(nodes, submit_to_ray, reference):
    """From four nodes to two to three; as many ranks see the same samples in the same order, or losses would differ."""
    nodes.bring_up(4)
    job = submit_to_ray(2, 4)
    four = nodes.wait_for_ranks(job, 4)
    wait_for_attempt(job, 1, step=6)
    leaving = [nodes.node_of(rank) for rank in four[2:]]
    with Held(four):
        for node in leaving:
            nodes.drain(node)
        held_at = max(losses(job.run))

    two = nodes.wait_for_ranks(job, 2, other_than=four)
    wait_for_attempt(job, 2)
    assert attempts(job.run)[1] >= held_at, "it saved where it stood"
    with Held(two):
        for node in leaving:
            nodes.kill(node)
        nodes.bring_up(3)
        held_at = max(losses(job.run))

    nodes.wait_for_ranks(job, 3, other_than=two)
    job.wait_until_finished()
    assert attempts(job.run)[2] >= held_at
    assert len(attempts(job.run)) == 3
    assert losses(job.run) == pytest.approx(losses(reference.run), rel=1e-5)
    assert logged_steps(job.run) == list(range(1, STEPS + 1))


def kill_a_rank(nodes, ranks):
    """Kill the last rank."""
    ranks[-1].kill()


def kill_the_driver(nodes, ranks):
    """Kill the process that talks to Ray."""
    (driver,) = nodes.drivers()
    driver.kill()


def kill_a_raylet(nodes, ranks):
    """Kill Ray's daemon under the last rank; return the node."""
    node = nodes.node_of(ranks[-1])
    nodes.kill_raylet(node)
    return node


def drain(nodes, ranks):
    """Announce that the last rank's node will be taken away; return it."""
    node = nodes.node_of(ranks[-1])
    nodes.drain(node)
    return node


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
