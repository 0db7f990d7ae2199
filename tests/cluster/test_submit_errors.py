"""What goes wrong at submission: one screen that says what, where and how to mend it, and exit code 2 or 3."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from cluster_jobs import NODES, PATIENCE_S, RECIPE, TINY, Frozen, sixfold, wait_for
from sixfold_launchers.job_book import JobBook

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            "partition=gup",
            [
                "invalid partition specified: gup",
                f"main ({NODES} nodes with 8 CPUs, 4096 MiB, gpu:2; limit infinite)",
            ],
        ),
        ("gpus_per_node=16", ["node configuration is not available", "gpu:2", "--with gpus_per_node=N"]),
        (f"nodes={NODES + 1}", ["node configuration is not available"]),
    ],
)
def test_what_slurm_would_refuse_is_refused_with_what_it_has(slurm_cluster, refuse, setting, words):
    asked = ("--with", setting, f"data.global_batch={NODES + 1}")  # which as many ranks can share
    said = refuse(2, *asked)
    assert [word for word in words if word not in said] == []
    assert all(word in refuse(2, *asked, "--dry-run") for word in words)
    assert JobBook().jobs() == [] or "submitting" not in {job.state for job in JobBook().jobs()}


def test_a_dead_cluster(slurm_cluster, refuse, tmp_path):
    assert "does not answer" in refuse(3, environment={"SLURM_CONF": str(tmp_path / "gone.conf")})
    alive = (slurm_cluster.state / "slurm.conf").read_text()
    (tmp_path / "gres.conf").touch()
    (tmp_path / "dead.conf").write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=9", alive) + "MessageTimeout=2\n")
    assert "infra/slurm/dev-cluster up" in refuse(3, environment={"SLURM_CONF": str(tmp_path / "dead.conf")})


def test_no_slurm_here(refuse, tmp_path):
    said = refuse(3, environment={"PATH": str(tmp_path)})
    assert "sbatch is not installed on this machine" in said


@pytest.mark.parametrize("to", ["slurm", "local"])
def test_a_folder_that_cannot_be_written(slurm_cluster, refuse, tmp_path, to):
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file" in refuse(3, "--with", f"runs={tmp_path}/file/runs", to=to)


@pytest.mark.parametrize(
    ("size", "writable", "words"),
    [("4k", "rw", "No space left on device"), ("1m", "ro", "Read-only file system")],
    ids=["full disk", "read-only folder"],
)
@pytest.mark.parametrize("to", ["local", "slurm", "slurm-ray"])
def test_a_disk_that_takes_no_run(slurm_cluster, refuse, tmp_path, to, size, writable, words):
    disk = f'mount -t tmpfs -o size={size},{writable} tmpfs {tmp_path} && exec "$@"'
    inside = ("unshare", "--mount", *(() if os.geteuid() == 0 else ("--map-root-user",)), "sh", "-c", disk, "sh")
    said = refuse(3, "--with", f"runs={tmp_path}/runs", to=to, inside=inside)
    assert words in said
    assert str(tmp_path) in said
    assert [job for job in JobBook().jobs() if job.state == "submitting"] == [], "nothing is left of the attempt"


def test_slurm_ray_refuses_what_slurm_refuses_and_what_has_no_room(slurm_cluster, refuse):
    assert "invalid partition specified: gup" in refuse(2, "--with", "partition=gup", to="slurm-ray")
    ranks = ("--with", "ranks.minimum=4", "--with", "ranks.maximum=4")
    assert "have room for 1 ranks, the profile wants at least 4" in refuse(2, *ranks, to="slurm-ray")


def test_a_malformed_profile_names_the_line(refuse, tmp_path):
    (tmp_path / "mine.yaml").write_text("type: slurm\nnodes: 2\npartiton: gpu\n")
    said = refuse(2, to=str(tmp_path / "mine.yaml"))
    assert f"{tmp_path}/mine.yaml:3: partiton: unknown key" in said
    assert "did you mean `partition`?" in said
    assert "did you mean `slurm`?" in refuse(2, to="slrum")


def test_a_dirty_tree_is_refused_or_shipped_with_its_difference(slurm_cluster, refuse, workplace, text, tmp_path):
    checkout = copy_of_the_checkout(tmp_path / "checkout")
    code = {"PYTHONPATH": ":".join(str(checkout / root) for root in ("platform", "launchers", "data_pipelines"))}
    changed = checkout / "platform/sixfold/train/loop.py"
    changed.write_text(changed.read_text() + "\n# a change\n")
    (checkout / "notes.txt").write_text("untracked\n")
    said = refuse(2, "--with", "snapshot.policy=tracked", environment=code)
    assert "1 tracked files differ from HEAD" in said
    assert "platform/sixfold/train/loop.py" in said
    assert "--with snapshot.policy=changes" in said

    done = sixfold(
        "submit", RECIPE, "--to", "slurm", f"data.path={text}", *TINY, "train.steps=1000", "--json",
        "--with", "snapshot.policy=changes", "--with", f"runs={workplace}/runs",
        "--with", "sbatch={hold: true}", environment=code, directory=workplace,
    )  # fmt: skip
    job = json.loads(done.stdout)
    slurm_cluster("scancel", job["cluster_id"])
    run, shipped = Path(job["runs"][0]), Path(job["code"])
    assert "+# a change" in (run / "code.diff").read_text()
    assert json.loads((run / "code.json").read_text())["not_shipped"] == ["notes.txt"]
    assert (shipped / "platform/sixfold/train/loop.py").read_text() == changed.read_text()
    assert not (shipped / "notes.txt").exists()
    tracked = git(checkout, "ls-files").split()
    assert sorted(str(path.relative_to(shipped)) for path in shipped.rglob("*") if path.is_file()) == sorted(
        [*tracked, ".snapshot.json"]
    )


def copy_of_the_checkout(folder):
    """The tracked files of this checkout, as they are, committed in a repository of their own."""
    for name in git(ROOT, "ls-files", "platform", "launchers", "data_pipelines", "recipes").split():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for source in ("platform", "launchers", "data_pipelines"):  # what is not tracked yet, but imported
        shutil.copytree(
            ROOT / source, folder / source, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "--message", "all")
    return folder


def git(folder, *arguments):
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_a_key_submits_once_whatever_happens_in_between(slurm_cluster, submit, refuse):
    first = submit("slurm", "train.steps=3", "--key", "nightly", settings=("sbatch={hold: true}",))
    again = submit("slurm", "train.steps=3", "--key", "nightly", settings=("sbatch={hold: true}",))
    assert (again.id, again.cluster_id) == (first.id, first.cluster_id)
    said = refuse(2, "train.steps=4", "--key", "nightly")
    assert "was used for a different submission" in said

    # The confirmation was lost: the book holds a job that it does not know to be on the cluster.
    book = JobBook()
    book.update(replace(book.find(first.id), cluster_id=None, state="submitting"))
    recovered = submit("slurm", "train.steps=3", "--key", "nightly", settings=("sbatch={hold: true}",))
    assert (recovered.id, recovered.cluster_id) == (first.id, first.cluster_id)
    assert slurm_cluster("squeue", "--noheader", f"--name=sixfold-{first.id}").count("\n") == 0

    # It never reached the cluster: the key submits it, once nobody can be about to do that.
    slurm_cluster("scancel", first.cluster_id)
    known = book.find(first.id)
    unseen = replace(known, cluster_id=None, state="submitting", spec=replace(known.spec, job_id="never-seen"))
    book.update(replace(unseen, submitted_s=0.0))
    anew = submit("slurm", "train.steps=3", "--key", "nightly", settings=("sbatch={hold: true}",))
    assert anew.cluster_id != first.cluster_id
    slurm_cluster("scancel", anew.cluster_id)


def test_two_jobs_cannot_work_on_one_run(submit, refuse):
    job = submit("local", "train.steps=200", "tracking.type=jsonl", "checkpoint.every_steps=1000")
    job.wait_for_step(2)
    with Frozen(job):
        said = refuse(2, "--run-dir", str(job.run), to="local")
    assert f"job {job.id} works on this run (running)" in said
    assert f"sixfold jobs cancel {job.id}" in said
    sixfold("jobs", "cancel", job.id)
    wait_for(lambda: job.state() == "cancelled", "the job did not end", PATIENCE_S, job)
