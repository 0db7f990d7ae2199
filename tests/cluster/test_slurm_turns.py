"""Single turns of a job: cancelled and taken up again, swept as an array, refused by its node."""

import json
import os

from cluster_jobs import (
    PATIENCE_S,
    Frozen,
    attempts,
    files_holding,
    logged_steps,
    losses,
    outcome,
    processes_naming,
    sixfold,
    wait_for,
)


def test_a_cancelled_job_saves_ends_and_may_be_taken_up(slurm_cluster, submit):
    job = submit("slurm", "train.steps=60", "tracking.type=jsonl", "checkpoint.every_steps=1000")
    ranks = job.wait_for_ranks(1)
    job.wait_for_step(3)
    with Frozen(job, ranks):
        told = sixfold("jobs", "cancel", job.id)
    assert "told to end" in told.stdout
    wait_for(lambda: job.state() == "cancelled", "the job did not end", PATIENCE_S, job)
    assert outcome(job.run) == "interrupted"
    saved = max(losses(job.run))
    assert saved < 60
    wait_for(lambda: not processes_naming(job.run), "processes outlived the job", PATIENCE_S)
    assert slurm_cluster.is_idle()
    again = sixfold("jobs", "cancel", job.id, check=False)
    assert again.returncode == 2
    assert "is cancelled already" in again.stderr

    sixfold("jobs", "requeue", job.id)
    wait_for(lambda: slurm_cluster.start_now(job.cluster_id), "the job was not requeued", PATIENCE_S, job)
    job.wait_until_finished()
    assert attempts(job.run) == [0, saved]
    assert logged_steps(job.run) == list(range(1, 61))
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


def test_a_secret_that_the_node_lacks_ends_the_job_with_the_fix(slurm_cluster, submit, tmp_path):
    job = submit("slurm", "train.steps=3", settings=("secrets=[DEMO_TOKEN]", f"secrets_folder={tmp_path}"))
    wait_for(lambda: job.state() == "failed", "the job did not fail", PATIENCE_S, job)
    assert "the secret DEMO_TOKEN cannot be read" in job.log()
    assert "Traceback" not in job.log()
    assert attempts(job.run) == []
