"""A job on this machine, whatever is killed of it, ends as if nothing had happened."""

import subprocess
import sys

import psutil

from cluster_jobs import (
    PATIENCE_S,
    REFERENCE,
    STEPS,
    Frozen,
    attempts,
    logged_steps,
    losses,
    mirrored,
    sixfold,
    wait_for,
    wait_for_attempt,
)


def test_a_local_job_survives_its_ranks_its_keeper_and_two_preemptions(submit, reference, workplace):
    job = submit("local", *REFERENCE, settings=("ranks=2",))
    first = job.wait_for_ranks(2)
    job.wait_for_step(6)
    with Frozen(job, first) as ranks:
        ranks[1].kill()
    second = job.wait_for_ranks(2, other_than=first)
    wait_for_attempt(job, 2, step=6)
    with Frozen(job, second):
        psutil.Process(int(job.cluster_id.partition("@")[0])).kill()
    wait_for(lambda: job.state() == "interrupted", "the job outlives its keeper", PATIENCE_S, job)
    sixfold("jobs", "requeue", job.id)
    ranks = second
    for turn in (3, 4):
        ranks = job.wait_for_ranks(2, other_than=ranks)
        wait_for_attempt(job, turn, step=3)
        with Frozen(job, ranks) as frozen:
            before = max(losses(job.run))
            requeueing = subprocess.Popen([sys.executable, "-m", "sixfold.cli.main", "jobs", "requeue", job.id])
            wait_for(frozen.are_told_to_save, "no rank was told to save", PATIENCE_S, job)
        assert requeueing.wait(PATIENCE_S) == 0
        wait_for_attempt(job, turn + 1)
        assert before < attempts(job.run)[-1] <= before + 2, "it saved at the next step boundary, and went on there"
    job.wait_until_finished()

    assert losses(job.run) == losses(reference.run)
    assert logged_steps(job.run) == list(range(1, STEPS + 1))
    assert mirrored(job.run, workplace)["points"]["train/loss"] == list(range(1, STEPS + 1)), "no point twice"
    job.wait_until_gone()
