"""Jobs that are killed, preempted, stopped by their time limit or stranded end as if nothing had happened."""

import json
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

from cluster_jobs import (
    PATIENCE_S,
    REFERENCE,
    STEPS,
    Frozen,
    attempts,
    logged_steps,
    losses,
    mirrored,
    outcome,
    processes_naming,
    sixfold,
    wait_for,
)

LONE_STEPS = 400  # enough that no turn ends before it is held
LONE = (f"train.steps={LONE_STEPS}", "checkpoint.every_steps=1000", "tracking.type=jsonl")
LIMITS = 5


def test_whatever_happens_to_jobs_they_end_as_if_nothing_had(slurm_cluster, submit, reference, workplace, tmp_path):
    """Three jobs are disturbed at a time, on nodes of their own: most of a disturbance is waiting for Slurm."""
    undisturbed = submit("local", *LONE)
    elsewhere = "sbatch={exclude: n4}"
    disturbed = submit("slurm", *REFERENCE, settings=("nodes=2", elsewhere))
    at_n4 = "sbatch={nodelist: n4}"
    limited = submit("slurm", *LONE, settings=("time_limit='2'", "save_before_limit_s=75", at_n4))
    stranded = submit("slurm", *LONE, settings=(f"environment.PATH={programs('srun', folder=tmp_path)}", at_n4))
    with ThreadPoolExecutor() as pool:
        ends = [pool.submit(drive, slurm_cluster, job) for drive, job in (
            (kill_preempt_and_strand, disturbed), (meet_limits, limited), (lack_a_client, stranded))]  # fmt: skip
        for end in ends:
            end.result()
    for job in (disturbed, limited, stranded, undisturbed):
        job.wait_until_finished()

    assert losses(disturbed.run) == losses(reference.run)
    assert logged_steps(disturbed.run) == list(range(1, STEPS + 1))
    points = mirrored(disturbed.run, workplace)["points"]
    assert points["train/loss"] == list(range(1, STEPS + 1)), "no point twice, none missing"
    assert (len(attempts(limited.run)), len(attempts(stranded.run))) == (LIMITS + 1, 2)
    for job in (limited, stranded):
        assert losses(job.run) == losses(undisturbed.run)
        assert logged_steps(job.run) == list(range(1, LONE_STEPS + 1))
    for job in (disturbed, limited, stranded):
        wait_for(lambda: job.state() == "finished", "the job did not end", PATIENCE_S, job)  # noqa: B023  # called at once
        wait_for(lambda: not processes_naming(job.run), "processes outlived the job", PATIENCE_S)  # noqa: B023  # as above
    wait_for(slurm_cluster.is_idle, "an allocation is held", PATIENCE_S)
    slurm_cluster.mend()


def kill_preempt_and_strand(cluster, job):
    """A rank is killed, the job is preempted twice, then one of its nodes is lost."""
    job.wait_for_step(6)
    with Frozen(job) as ranks:
        ranks.processes[0].send_signal(signal.SIGKILL)
    wait_for(lambda: len(attempts(job.run)) == 2, "the ranks did not start again", PATIENCE_S, job)
    for turn in (3, 4):
        held_at = preempt(cluster, job)
        wait_for(lambda: len(attempts(job.run)) == turn, "the preempted run did not go on", PATIENCE_S, job)  # noqa: B023  # called before the next turn
        assert held_at < attempts(job.run)[-1] <= held_at + 2, "it saved at the next step boundary, and went on there"
    job.wait_for_step(max(losses(job.run), default=0) + 3)
    cluster.kill_node(cluster.nodes(job.cluster_id)[1])
    wait_for(lambda: cluster.start_now(job.cluster_id), "the job outlived its node, unqueued", PATIENCE_S, job)


def preempt(cluster, job):
    """Let a job of another partition take the nodes, and have Slurm give them back; return the step before."""
    job.wait_for_step(max(losses(job.run), default=0) + 3)
    with Frozen(job) as ranks:
        before = max(losses(job.run))
        urgent = cluster(
            "sbatch", "--parsable", "--partition=urgent", "--exclusive", "--wrap=sleep 1", "--output=/dev/null",
            f"--nodelist={','.join(cluster.nodes(job.cluster_id))}", "--nodes=2",
        )  # fmt: skip
        wait_for(lambda: ranks.has_pending(signal.SIGTERM, signal.SIGUSR1), "no rank was told to save", PATIENCE_S, job)
    wait_for(lambda: cluster.field(urgent, "JobState") == "COMPLETED", "the urgent job did not run", PATIENCE_S)
    wait_for(lambda: cluster.start_now(job.cluster_id), "the preempted job was not requeued", PATIENCE_S, job)
    return before


def meet_limits(cluster, job):
    """Let a job run into its time limit, three steps after it started or went on, several times."""
    for turn in range(1, LIMITS + 1):
        wait_for(lambda: begins(cluster, job, turn), f"turn {turn} did not begin", PATIENCE_S, job)  # noqa: B023  # called before the next turn
        enough = attempts(job.run)[-1] + 3
        wait_for(
            lambda: max(losses(job.run), default=0) >= enough or outcome(job.run) == "interrupted",  # noqa: B023  # as above
            f"turn {turn} trained nothing", PATIENCE_S, job,
        )  # fmt: skip
        if outcome(job.run) != "interrupted":  # a slow start may take as long as Slurm does
            with Frozen(job) as ranks:  # it trains no further while Slurm makes up its mind
                wait_for(lambda: ranks.has_pending(signal.SIGUSR1), "no rank heard of the time limit", PATIENCE_S, job)
        wait_for(lambda: outcome(job.run) == "interrupted", "the ranks did not save", PATIENCE_S, job)
        wait_for(lambda: cluster.start_now(job.cluster_id), "the job was not requeued", PATIENCE_S, job)


def begins(cluster, job, turn):
    """Whether a turn has begun; where the limit came even before that, Slurm is asked once more."""
    return len(attempts(job.run)) == turn or (cluster.start_now(job.cluster_id) and False)


def lack_a_client(cluster, job):
    """Ask a job for its node where it cannot requeue itself; `sixfold jobs requeue` does it from here."""
    job.wait_for_step(4)
    cluster("scancel", "--batch", "--signal=USR1", job.cluster_id)
    wait_for(lambda: job.state() == "interrupted", "the job is not known to be interrupted", PATIENCE_S, job)
    assert f"sixfold jobs requeue {job.id}" in job.log()
    listed = json.loads(sixfold("jobs", "list", "--json").stdout)
    assert next(row for row in listed if row["job_id"] == job.id)["state"] == "interrupted"
    sixfold("jobs", "requeue", job.id)
    wait_for(lambda: cluster.start_now(job.cluster_id), "the job was not requeued", PATIENCE_S, job)


def programs(*names, folder):
    """A PATH with what the batch script needs of a shell, and these programs of Slurm's."""
    for name in ("cat", "seq", "rm", "grep", "sleep", "bash", *names):
        (folder / name).symlink_to(shutil.which(name))
    return folder
