"""Jobs that need many turns: five time limits, nodes without a Slurm client, and requests by hand."""

import json
import os
import shutil
import signal
from pathlib import Path

from cluster_jobs import Frozen, attempts, logged_steps, losses, outcome, processes_naming, sixfold, wait_for

LONE = ("train.steps=30", "checkpoint.every_steps=1000", "tracking.type=jsonl")


def test_five_time_limits_and_a_node_without_client_change_nothing(slurm_cluster, submit, tmp_path):
    """Both jobs train while the other waits for Slurm; what is undisturbed trains on this machine."""
    undisturbed = submit("local", *LONE)
    limited = submit("slurm", *LONE, settings=("time_limit='1'", "save_before_limit_s=50"))
    stranded = submit("slurm", *LONE, settings=(f"environment.PATH={only('srun', tmp_path)}",))

    meet_limit(slurm_cluster, limited, 1)
    be_stranded(slurm_cluster, stranded)
    for turn in range(2, 6):
        meet_limit(slurm_cluster, limited, turn)
    for job in (undisturbed, limited, stranded):
        job.wait_until_finished()

    assert len(attempts(limited.run)) == 6
    assert len(attempts(stranded.run)) == 2
    for job in (limited, stranded):
        assert losses(job.run) == losses(undisturbed.run)
        assert logged_steps(job.run) == list(range(1, 31))
        wait_for(lambda: job.state() == "finished", "the job did not end", 60, job)  # noqa: B023  # called at once
    wait_for(slurm_cluster.is_idle, "an allocation is held", 60)


def meet_limit(cluster, job, turn):
    """Let a job run into its time limit, three steps after it started or went on."""
    wait_for(lambda: len(attempts_of(job)) == turn, f"turn {turn} did not begin", 240, job)
    job.wait_for_step(max(attempts(job.run)[-1] + 3, 1))
    with Frozen(job) as ranks:  # it trains no further while Slurm makes up its mind
        wait_for(lambda: ranks.has_pending(signal.SIGUSR1), "no rank heard of the time limit", 240, job)
    wait_for(lambda: outcome(job.run) == "interrupted", "the ranks did not save", 240, job)
    wait_for(lambda: cluster.start_now(job.cluster_id), "the job was not requeued", 240, job)


def be_stranded(cluster, job):
    """Ask a job for its node where it cannot requeue itself; `sixfold jobs requeue` does it from here."""
    wait_for(lambda: attempts_of(job), "the job did not begin", 240, job)
    job.wait_for_step(4)
    cluster("scancel", "--batch", "--signal=USR1", job.cluster_id)
    wait_for(lambda: job.state() == "interrupted", "the job is not known to be interrupted", 240, job)
    assert f"sixfold jobs requeue {job.id}" in job.log()
    listed = json.loads(sixfold("jobs", "list", "--json").stdout)
    assert next(row for row in listed if row["job_id"] == job.id)["state"] == "interrupted"
    sixfold("jobs", "requeue", "--interrupted")
    wait_for(lambda: cluster.start_now(job.cluster_id), "the job was not requeued", 240, job)


def attempts_of(job):
    return attempts(job.run) if (job.run / "events.jsonl").exists() else []


def only(program, folder):
    """A PATH with the batch script's own needs, and one program of Slurm's."""
    for name in ("cat", "seq", "rm", "grep", "sleep", "bash", program):
        (folder / name).symlink_to(shutil.which(name))
    return folder


def test_a_cancelled_job_saves_ends_and_may_be_taken_up(slurm_cluster, submit):
    job = submit("slurm", "train.steps=12", "tracking.type=jsonl", "checkpoint.every_steps=1000")
    job.wait_for_step(3)
    with Frozen(job):
        told = sixfold("jobs", "cancel", job.id)
    assert "told to end" in told.stdout
    wait_for(lambda: job.state() == "cancelled", "the job did not end", 240, job)
    assert outcome(job.run) == "interrupted"
    saved = max(losses(job.run))
    assert saved < 12
    wait_for(lambda: not processes_naming(job.run), "processes outlived the job", 60)
    assert slurm_cluster.is_idle()
    again = sixfold("jobs", "cancel", job.id, check=False)
    assert again.returncode == 2
    assert "is cancelled already" in again.stderr

    sixfold("jobs", "requeue", job.id)
    wait_for(lambda: slurm_cluster.start_now(job.cluster_id), "the job was not requeued", 240, job)
    job.wait_until_finished()
    assert attempts(job.run) == [0, saved]
    assert logged_steps(job.run) == list(range(1, 13))
    assert "resumed after step" in sixfold("jobs", "logs", job.id).stdout


def test_a_sweep_is_an_array_that_runs_shipped_code_with_secrets_nobody_sees(
    slurm_cluster, submit, workplace, tmp_path
):
    value = "planted-" + os.urandom(8).hex()
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "DEMO_TOKEN").write_text(value + "\n")
    (secrets / "DEMO_TOKEN").chmod(0o600)
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("grid: {seed: [1, 2]}\n")
    in_the_shell = "planted-" + os.urandom(8).hex()
    job = submit(
        "slurm", "train.steps=3", "tracking.type=mlflow", "tracking.system_metrics=false", "--array", sweep,
        settings=("secrets=[DEMO_TOKEN]", f"secrets_folder={secrets}", 'setup=["set -o | grep -c on"]'),
        environment={"SHELL_TOKEN": in_the_shell},
    )  # fmt: skip
    assert len(job.runs) == 2
    job.wait_until_finished()
    first, second = (losses(run) for run in job.runs)
    assert sorted(first) == sorted(second) == [1, 2, 3]
    assert first != second, "each run of the sweep has its own seed"
    assert json.loads((job.run / "code.json").read_text())["tree"]
    snapshot = next((workplace / "runs/.code").iterdir())
    assert (snapshot / "platform/sixfold/train/loop.py").is_file()
    assert not (snapshot / ".git").exists()

    planted = [value.encode(), in_the_shell.encode()]
    shown = slurm_cluster("scontrol", "show", "job", "--details", job.cluster_id).encode()
    places = [workplace, slurm_cluster.state, os.environ["SIXFOLD_STATE"]]
    assert not [word for word in planted if word in shown]
    assert files_holding(planted, places) == []


def files_holding(words, folders):
    """Every file below the folders that holds one of the words."""
    files = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    return [path for path in files if any(word in path.read_bytes() for word in words)]


def test_a_secret_that_the_node_lacks_ends_the_job_with_the_fix(slurm_cluster, submit, tmp_path):
    job = submit("slurm", "train.steps=3", settings=("secrets=[DEMO_TOKEN]", f"secrets_folder={tmp_path}"))
    wait_for(lambda: job.state() == "failed", "the job did not fail", 120, job)
    assert "the secret DEMO_TOKEN cannot be read" in job.log()
    assert "Traceback" not in job.log()
    assert attempts_of(job) == []
