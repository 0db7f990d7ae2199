"""Jobs on Slurm, with and without a Ray of their own, that are killed, preempted, limited or stranded lose nothing."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

from cluster_jobs import (
    PATIENCE_S,
    REFERENCE,
    STEPS,
    Frozen,
    attempts,
    command_of,
    logged_steps,
    losses,
    mirrored,
    outcome,
    processes_naming,
    sixfold,
    wait_for,
    wait_for_attempt,
)

LONE_STEPS = 300
LONE = (f"train.steps={LONE_STEPS}", "checkpoint.every_steps=1000", "tracking.type=jsonl")
LIMITS = 5
EVERY_S = 0.5  # between looks that cost a process
RANKS_LOOK_EVERY_S = 0.5  # at the request that Ray's ranks find in the run's folder
ON_TWO_NODES = ("nodes=2", "ranks.minimum=2", "ranks.maximum=2", "placement=STRICT_SPREAD", "max_failures=9")
AFTER_45_S, AFTER_60_S = (
    (f"time_limit='{minutes}'", f"save_before_limit_s={60 * minutes - seconds}")
    for minutes, seconds in ((2, 45), (3, 60))
)


def test_whatever_happens_to_jobs_they_end_as_if_nothing_had(slurm_cluster, submit, reference, workplace, tmp_path):
    """All jobs are disturbed at a time, on nodes of their own: most of a disturbance is waiting for Slurm."""
    undisturbed = submit("local", *LONE)
    undisturbed.wait_until_finished()
    without_srun = f"environment.PATH={programs('srun', folder=tmp_path)}"
    with ThreadPoolExecutor() as pool:
        disturbed = [
            submit("slurm", *REFERENCE, settings=("nodes=2", "sbatch={exclude: 'n[5-9]'}")),
            submit("slurm-ray", *REFERENCE, settings=(*ON_TWO_NODES, "sbatch={exclude: 'n[1-4,8-9]'}")),
        ]
        limited = [
            submit("slurm", *LONE, settings=(*AFTER_45_S, "sbatch={nodelist: n8}")),
            submit("slurm-ray", *LONE, settings=(*AFTER_60_S, "sbatch={nodelist: n9}")),
        ]
        stranded = submit("slurm", *LONE, settings=(without_srun, "sbatch={nodelist: n8}"))
        ends = [
            pool.submit(disturb, slurm_cluster, job, *ordeal)
            for job, ordeal in zip(disturbed, (ORDEAL, RAY_ORDEAL), strict=True)
        ]
        ends += [pool.submit(meet_limits, slurm_cluster, job) for job in limited]
        ends += [pool.submit(lack_a_client, slurm_cluster, stranded)]
        for end in ends:
            end.result()
    jobs = [*disturbed, *limited, stranded]
    for job in jobs:
        job.wait_until_finished()

    for job in disturbed:
        assert losses(job.run) == losses(reference.run)
        assert logged_steps(job.run) == list(range(1, STEPS + 1))
        points = mirrored(job.run, workplace)["points"]
        assert points["train/loss"] == list(range(1, STEPS + 1)), "no point twice, none missing"
    assert len(attempts(stranded.run)) == 2
    assert all(len(attempts(job.run)) > LIMITS for job in limited), "more limits than these may come on a busy host"
    for job in (*limited, stranded):
        assert losses(job.run) == losses(undisturbed.run)
        assert logged_steps(job.run) == list(range(1, LONE_STEPS + 1))
    slurm_cluster.mend()  # a node that comes back ends what it had been running
    for job in jobs:
        job.wait_until_gone()
    wait_for(slurm_cluster.is_idle, "an allocation is held", PATIENCE_S)


def disturb(cluster, job, *events):
    """Let one thing happen to a job in each of its turns, once it has trained a little; the last turn is left alone."""
    ranks, last, held_at = [], None, 0
    for turn, event in enumerate((*events, None), start=1):
        ranks = next_ranks(cluster, job, 2, ranks)
        wait_for_attempt(job, turn, step=1 if event is None else 3)
        if last is preempt:
            went_on_at = attempts(job.run)[turn - 1]
            assert held_at < went_on_at <= held_at + 2, "it saved at the next step boundary, and went on there"
        if event is not None:
            with Frozen(job, ranks) as frozen:
                held_at = max(losses(job.run))
                event(cluster, job, frozen)
        last = event


def next_ranks(cluster, job, count, before):
    """Wait for the ranks of the next turn, before they train; where the job waits for it, Slurm is asked to begin."""
    return job.wait_for_ranks(count, other_than=before, meanwhile=lambda: cluster.start_now(job.cluster_id))


def kill_a_rank(cluster, job, frozen):
    """Kill one rank while all are held."""
    frozen[0].kill()


def kill_driver(cluster, job, frozen):
    """Kill the process that talks to Ray."""
    (driver,) = [each for each in processes_naming(job.run) if "ray_driver --attempt" in command_of(each)]
    driver.kill()


def kill_a_raylet(cluster, job, frozen):
    """Kill Ray's daemon on the second node, which ends the turn."""
    job.ray("/raylet/raylet")[-1].kill()


def preempt(cluster, job, frozen):
    """Let a job of another partition take the nodes, and have Slurm give them back."""
    cluster(
        "sbatch", "--parsable", "--partition=urgent", "--exclusive", "--wrap=sleep 1", "--output=/dev/null",
        f"--nodelist={','.join(cluster.nodes(job.cluster_id))}", "--nodes=2",
    )  # fmt: skip
    wait_for(frozen.are_told_to_save, "no rank was told to save", PATIENCE_S, job)
    time.sleep(RANKS_LOOK_EVERY_S)  # so that the next step boundary is one at which they look


def lose_a_node(cluster, job, frozen):
    """A node and all on it are gone at once."""
    cluster.kill_node(cluster.nodes(job.cluster_id)[1])


def lose_a_daemon(cluster, job, frozen):
    """A node's daemon is gone, its ranks are not: none of them may train on beside those of the next turn."""
    cluster.kill_daemon(cluster.nodes(job.cluster_id)[1])
    wait_for_end_of_turn(cluster, job)


def kill_the_shell(cluster, job, frozen):
    """Kill the batch shell, after which Slurm ends the job and nobody but the user asks for another turn."""
    (shell,) = processes_naming(f"/job{int(job.cluster_id):05d}/slurm_script")
    shell.kill()
    wait_for_end_of_turn(cluster, job)
    assert job.state() in ("failed", "interrupted")
    sixfold("jobs", "requeue", job.id)


def wait_for_end_of_turn(cluster, job):
    """Wait until Slurm runs a job no longer."""
    ended = ("PENDING", "FAILED", "COMPLETED", "NODE_FAIL")
    wait_for(lambda: cluster.field(job.cluster_id, "JobState") in ended, "the turn goes on", PATIENCE_S, job, EVERY_S)


ORDEAL = (kill_a_rank, preempt, preempt, lose_a_node, lose_a_daemon, kill_the_shell)
RAY_ORDEAL = (kill_a_rank, kill_driver, preempt, preempt, kill_a_raylet, lose_a_node)


def meet_limits(cluster, job):
    """Let a job run into its time limit, once it has started or gone on, several times."""
    ranks = []
    for turn in range(1, LIMITS + 1):
        ranks = next_ranks(cluster, job, 1, ranks)
        wait_for_turn(cluster, job, turn)
        if outcome(job.run) != "interrupted":  # a slow start may take as long as Slurm does
            with Frozen(job, ranks) as frozen:  # it trains no further while Slurm makes up its mind
                wait_for(frozen.are_told_to_save, "no rank heard of the time limit", PATIENCE_S, job)
        wait_for(lambda: outcome(job.run) == "interrupted", "the ranks did not save", PATIENCE_S, job)
    next_ranks(cluster, job, 1, ranks)


def wait_for_turn(cluster, job, turn):
    """Wait until a turn has begun to train; a limit may come before, and then there is another."""

    def has_begun():
        return len(attempts(job.run)) >= turn or (cluster.start_now(job.cluster_id) and False)

    wait_for(has_begun, f"turn {turn} did not begin", PATIENCE_S, job, every_s=0.1)


def lack_a_client(cluster, job):
    """Ask a job for its node where it cannot requeue itself; `sixfold jobs requeue` does it from here."""
    job.wait_for_step(4)
    cluster("scancel", "--batch", "--signal=USR1", job.cluster_id)
    wait_for(lambda: job.state() == "interrupted", "the job is not known to be interrupted", PATIENCE_S, job)
    assert f"sixfold jobs requeue {job.id}" in job.log()
    listed = json.loads(sixfold("jobs", "list", "--json").stdout)
    assert next(row for row in listed if row["job_id"] == job.id)["state"] == "interrupted"
    sixfold("jobs", "requeue", job.id)
    next_ranks(cluster, job, 1, ())


def programs(*names, folder):
    """A PATH with what the batch script needs of a shell, and these programs of Slurm's."""
    for name in ("cat", "seq", "rm", "grep", "sleep", "bash", *names):
        (folder / name).symlink_to(shutil.which(name))
    return folder
