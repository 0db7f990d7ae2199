"""One recipe, here and on Slurm: the same losses, the same MLflow run; and whatever happens to a job, the same end."""

import signal

from cluster_jobs import (
    REFERENCE,
    STEPS,
    Frozen,
    attempts,
    logged_steps,
    losses,
    outcome,
    processes_naming,
    wait_for,
)
from tracked_run import Stored


def mirrored(run, workplace):
    """A run in the MLflow store of the workplace: names of what it holds, and points by metric."""
    stored = Stored(run, f"sqlite:///{workplace}/mlflow.db")
    metrics = [name for name in stored.run.data.metrics if not name.startswith("system/")]
    tags = {name for name in stored.run.data.tags if not name.startswith(("variable.", "mlflow.source.git"))}
    return {
        "parameters": set(stored.run.data.params),
        "tags": tags,
        "status": stored.run.info.status,
        "artifacts": stored.artifacts(),
        "points": {name: stored.steps(name) for name in metrics},
    }


def test_slurm_trains_what_this_machine_trains(slurm_cluster, submit, reference, workplace):
    job = submit("slurm", *REFERENCE, settings=("nodes=2",))
    job.wait_until_finished()
    here, there = losses(reference.run), losses(job.run)
    assert sorted(here) == sorted(there) == list(range(1, STEPS + 1))
    assert all(abs(there[step] - loss) <= 1e-5 * abs(loss) for step, loss in here.items())
    assert mirrored(job.run, workplace) == mirrored(reference.run, workplace)
    assert attempts(job.run) == [0]
    wait_for(lambda: job.state() == "finished", "Slurm did not end the job", 30, job)
    assert slurm_cluster("squeue", "--noheader", f"--jobs={job.cluster_id}", "--states=R") == ""


def preempt(slurm_cluster, job):
    """Let a job of another partition take the nodes, and have Slurm give them back at once."""
    job.wait_for_step(max(losses(job.run), default=0) + 3)
    with Frozen(job) as ranks:
        before = max(losses(job.run))
        urgent = slurm_cluster(
            "sbatch", "--parsable", "--partition=urgent", "--exclusive", "--wrap=sleep 1", "--output=/dev/null",
            f"--nodelist={slurm_cluster.field(job.cluster_id, 'NodeList')}", "--nodes=2",
        )  # fmt: skip
        wait_for(lambda: ranks.has_pending(signal.SIGTERM, signal.SIGUSR1), "no rank was told to save", 240, job)
    wait_for(lambda: outcome(job.run) == "interrupted", "the preempted ranks did not save", 240, job)
    assert max(losses(job.run)) <= before + 2, "a preempted run saves at the next step boundary"
    wait_for(lambda: slurm_cluster.field(urgent, "JobState") == "COMPLETED", "the urgent job did not run", 240)
    wait_for(lambda: slurm_cluster.start_now(job.cluster_id), "the preempted job was not requeued", 240, job)


def test_killed_preempted_and_stranded_a_run_ends_the_same(slurm_cluster, submit, reference, workplace):
    job = submit("slurm", *REFERENCE, settings=("nodes=2",))

    job.wait_for_step(6)
    with Frozen(job) as ranks:  # a rank is killed: Slurm keeps the nodes, the ranks start again
        ranks.processes[0].send_signal(signal.SIGKILL)
    wait_for(lambda: len(attempts(job.run)) == 2, "the ranks did not start again", 240, job)

    for turn in (3, 4):
        preempt(slurm_cluster, job)
        wait_for(lambda: len(attempts(job.run)) == turn, "the preempted run did not go on", 240, job)  # noqa: B023  # called before the next turn
        assert attempts(job.run)[-1] > attempts(job.run)[-2], "it resumed where it had saved"

    job.wait_for_step(max(losses(job.run), default=0) + 3)
    second = slurm_cluster("scontrol", "show", "hostnames", slurm_cluster.field(job.cluster_id, "NodeList")).split()[1]
    slurm_cluster.kill_node(second)
    wait_for(lambda: slurm_cluster.start_now(job.cluster_id), "the job outlived its node, unqueued", 240, job)
    job.wait_until_finished()

    assert losses(job.run) == losses(reference.run)
    assert logged_steps(job.run) == list(range(1, STEPS + 1))
    points = mirrored(job.run, workplace)["points"]
    assert points["train/loss"] == list(range(1, STEPS + 1)), "no point twice, none missing"
    wait_for(lambda: not processes_naming(job.run), "processes outlived the job", 30)
    wait_for(slurm_cluster.is_idle, "an allocation is held", 30)
    slurm_cluster.mend()
