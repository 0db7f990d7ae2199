"""The job book, profiles, sweeps, snapshots and secrets: the parts that need no cluster."""

import json
import multiprocessing
import os
import sqlite3
import subprocess
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from sixfold.errors import EnvironmentFault, UserError
from sixfold.tracking.environment import SNAPSHOT_RECORD
from sixfold_launchers.contract import JobRecord, JobSpec, RunSpec, launcher_of
from sixfold_launchers.job_book import JobBook, reconcile
from sixfold_launchers.local_jobs import KEEPER
from sixfold_launchers.profile_files import ProfileError, describe_kind, load_profile
from sixfold_launchers.profiles import KINDS, profile_of
from sixfold_launchers.secrets import put_into_environment, resolve
from sixfold_launchers.snapshot import plan_snapshot, ship
from sixfold_launchers.submission import plan
from sixfold_launchers.sweep import load_sweep


def record(folder, job_id="j1", **changes):
    spec = JobSpec(
        job_id=job_id,
        folder=folder / job_id,
        runs=(RunSpec(folder=folder / "run", recipe="lm/x", overrides=("seed=1",)),),
        directory=folder,
        python="/opt/python",
        code=folder / "code",
    )
    job = JobRecord(
        job_id=job_id,
        key=None,
        digest="d",
        kind="local",
        cluster_id=None,
        profile_name="local",
        profile=load_profile("local", ["secrets=[A]", "snapshot.policy=changes"]).profile,
        spec=spec,
        state="submitting",
        submitted_s=time.time(),
    )
    return replace(job, **changes)


def test_a_job_comes_back_as_it_was_written(tmp_path):
    job = record(tmp_path, key="k", nodes=("n1", "n2"), detail="x")
    assert JobBook(tmp_path).begin(job) is None
    assert JobBook(tmp_path).jobs() == [job]
    again = JobBook(tmp_path).update(replace(job, state="running", cluster_id="7"))
    assert JobBook(tmp_path).find("7") == again
    assert JobBook(tmp_path).of_run(tmp_path / "run") == [again]
    assert JobBook(tmp_path).of_run(tmp_path / "other") == []


def test_a_damaged_book_is_named_with_what_mends_it(tmp_path):
    book = JobBook(tmp_path)
    book.begin(record(tmp_path))
    with closing(sqlite3.connect(book.path)) as opened, opened:
        opened.execute("UPDATE jobs SET record = '{'")
    with pytest.raises(
        EnvironmentFault, match=r"entry of job j1 cannot be read(.|\n)*DELETE FROM jobs WHERE job_id = 'j1'"
    ):
        book.jobs()
    book.path.write_bytes(b"no database, whatever its name says" * 100)
    with pytest.raises(EnvironmentFault, match="move it away"):
        JobBook(tmp_path)


@pytest.mark.parametrize(
    ("limit", "seconds", "accepted"),
    [("2", 120, False), ("3", 120, True), ("'0:02:00'", 120, False), ("'2:30'", 120, True), ("'1-0:00'", 3600, True)],
)
def test_a_time_limit_leaves_time_to_step_before_saving(limit, seconds, accepted):
    settings = [f"time_limit={limit}", f"save_before_limit_s={seconds}"]
    if accepted:
        assert load_profile("slurm", settings).profile.time_limit == limit.strip("'")
    else:
        with pytest.raises(ProfileError, match="leaves nothing of time_limit"):
            load_profile("slurm", settings)


def test_equal_runs_of_a_sweep_are_refused(tmp_path):
    (tmp_path / "sweep.yaml").write_text("grid: {seed: [1, 2, 1]}\n")
    with pytest.raises(UserError, match="two runs of the sweep are the same: seed=1"):
        load_sweep(tmp_path / "sweep.yaml")


@pytest.mark.parametrize("kind", ["local", "ray", "slurm", "slurm-ray"])
def test_followed_logs_go_on_where_the_last_turn_ended(tmp_path, kind):
    job = record(tmp_path)
    job.spec.logs.mkdir(parents=True)
    log = job.spec.logs / "1.out"
    launcher = launcher_of(load_profile(kind).profile)
    log.write_text("first turn\n")
    assert list(launcher.logs(job, follow=False)) == ["first turn\n"]
    log.write_text("first turn\nsecond turn\n")
    assert list(launcher.logs(job, follow=False)) == ["second turn\n"]


def test_a_key_stands_for_one_submission(tmp_path):
    book = JobBook(tmp_path)
    first = record(tmp_path, key="k")
    assert book.begin(first) is None
    assert book.begin(record(tmp_path, "j2", key="k")) == first
    with pytest.raises(UserError, match="used for a different submission"):
        book.begin(record(tmp_path, "j3", key="k", digest="other"))
    book.forget("j1")
    assert book.begin(record(tmp_path, "j2", key="k")) is None


def test_an_automatic_key_stands_for_recipe_profile_and_folder(tmp_path):
    def key(*, steps=3, ranks=1, folder="run"):
        profile = load_profile("local", [f"ranks={ranks}"])
        settings = ["data.path=x", f"train.steps={steps}"]
        return plan("lm/moe-smoke", settings, profile, run_dir=tmp_path / folder, key="auto").key

    assert key() == key()
    assert len({key(), key(steps=4), key(ranks=2), key(folder="other")}) == 4


def begin_many(folder, number):
    book = JobBook(folder)
    for index in range(20):
        book.begin(record(folder, f"j{number}-{index}", key=f"k{index}"))


def test_processes_that_write_at_once_lose_nothing_and_agree_on_keys(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=begin_many, args=(tmp_path, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(JobBook(tmp_path).jobs()) == len({job.key for job in JobBook(tmp_path).jobs()}) == 20


def test_a_lost_confirmation_is_made_up_for_and_a_job_never_seen_is_lost(tmp_path):
    book = JobBook(tmp_path)
    seen, unseen, fresh = record(tmp_path, "seen"), record(tmp_path, "old", submitted_s=0.0), record(tmp_path, "new")
    for job in (seen, unseen, fresh):
        job.spec.folder.mkdir()
        book.begin(job)
    (seen.spec.folder / KEEPER).write_text("1@0.00")
    answers = [job for job, fault in reconcile(book, [seen, unseen, fresh]) if fault is None]
    assert [(job.cluster_id, job.state) for job in answers] == [
        ("1@0.00", "interrupted"),
        (None, "lost"),
        (None, "submitting"),
    ]


def test_a_book_that_cannot_be_opened_says_where(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match="SIXFOLD_STATE"):
        JobBook(tmp_path / "file" / "deeper")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "type: slurm\nnodes: 0\n",
            ["mine.yaml:2: nodes: got 0", "an integer from 1", "`sixfold jobs profiles slurm`"],
        ),
        ("type: slrm\n", ["mine.yaml:1", "did you mean `slurm`?"]),
        ("nodes: 1\n", ["type is missing", "local, ray, slurm, slurm_ray"]),
        ("type: slurm\ntime_limit: soon\n", ["mine.yaml:2: time_limit"]),
        ("type: slurm\nsbatch: {nodes: 3}\n", ["sbatch.nodes is set by nodes"]),
        ("type: slurm\nsbatch: {--mem: 3}\n", ["no long option"]),
        ("type: local\nenvironment: {HF_TOKEN: abc}\n", ["looks like a secret", "secrets: [HF_TOKEN]"]),
        ("type: ray\nranks: {minimum: 4, maximum: 2}\n", ["minimum is 4 and maximum 2"]),
        ("base: none.yaml\ntype: local\n", ["mine.yaml:1", "does not exist"]),
    ],
)
def test_a_malformed_profile_says_where_and_what_is_allowed(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(text)
    with pytest.raises(ProfileError) as refused:
        load_profile("mine.yaml")
    assert [word for word in words if word not in str(refused.value)] == []


def test_profiles_stand_on_others_and_come_back_from_their_dump(tmp_path):
    (tmp_path / "site.yaml").write_text("type: slurm\npartition: gpu\nnodes: 2\nranks_per_node: 4\n")
    (tmp_path / "mine.yaml").write_text("base: site.yaml\nnodes: 3\n")
    profile = load_profile(str(tmp_path / "mine.yaml"), ["qos=high"]).profile
    assert (profile.partition, profile.nodes, profile.qos, profile.ranks_allowed()) == ("gpu", 3, "high", (12,))
    assert profile_of(json.loads(json.dumps(profile.model_dump(mode="json")))) == profile


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_described(kind):
    assert all(row["description"] and row["allowed"] for row in describe_kind(kind))


def test_a_sweep_is_a_grid_at_each_point(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("grid: {optimizer.lr: [1e-3, 1e-4], seed: [0, 1]}\npoints: [{train.steps: 5}, {name: a/b}]\n")
    runs = load_sweep(path)
    assert len(runs) == 8
    assert runs[0] == ("train.steps=5", "optimizer.lr=0.001", "seed=0")
    assert runs[-1] == ('name="a/b"', "optimizer.lr=0.0001", "seed=1")
    for text, word in (
        ("{}", "a sweep needs"),
        ("grid: {seed: []}", "empty list"),
        ("gird: {}", "did you mean `grid`"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=word):
            load_sweep(path)


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def checkout(tmp_path):
    """A repository with a committed, a changed, a staged, a deleted, an untracked and an ignored file."""
    folder = tmp_path / "checkout"
    (folder / "source").mkdir(parents=True)
    git(folder, "init", "--quiet")
    for name in ("same", "changed", "deleted"):
        (folder / "source" / name).write_text(name)
    (folder / ".gitignore").write_text("ignored\n")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "all")
    return folder


def dirty(folder):
    (folder / "source/changed").write_text("changed again")
    (folder / "source/deleted").unlink()
    (folder / "source/staged").write_text("new")
    git(folder, "add", "source/staged")
    (folder / "source/untracked").write_text("new")
    (folder / "source/ignored").write_text("big")


def shipped(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_snapshot_is_exactly_what_git_tracks(checkout, tmp_path):
    clean = plan_snapshot("tracked", checkout / "source")
    assert (
        plan_snapshot("changes", checkout / "source").tree
        == clean.tree
        == git(checkout, "rev-parse", "HEAD^{tree}").strip()
    )
    dirty(checkout)
    with pytest.raises(UserError, match=r"3 tracked files differ.*source/changed, source/deleted, source/staged"):
        plan_snapshot("tracked", checkout / "source")
    before = git(checkout, "status", "--porcelain"), git(checkout, "count-objects")
    found = plan_snapshot("changes", checkout / "source")
    ship(found, tmp_path / "code" / found.name)
    assert (git(checkout, "status", "--porcelain"), git(checkout, "count-objects")) == before, (
        "the checkout is only read"
    )
    files = shipped(tmp_path / "code" / found.name)
    state = json.loads(files.pop(SNAPSHOT_RECORD))
    assert files == {
        ".gitignore": "ignored\n",
        "source/same": "same",
        "source/changed": "changed again",
        "source/staged": "new",
    }
    assert state["dirty"]
    assert state["difference_sha256"]
    assert found.not_shipped == ("source/untracked",)
    assert "+changed again" in found.difference
    assert [path.name for path in (tmp_path / "code").iterdir()] == [found.name], "nothing half-written stays"


def test_code_that_changes_while_it_is_submitted_is_refused(checkout, tmp_path):
    found = plan_snapshot("changes", checkout / "source")
    (checkout / "source/same").write_text("edited")
    with pytest.raises(UserError, match="changed while it was being submitted"):
        ship(found, tmp_path / "code" / found.name)
    assert list((tmp_path / "code").iterdir()) == []


def test_outside_git_the_installed_package_runs(tmp_path):
    found = plan_snapshot("tracked", tmp_path)
    assert (found.policy, found.tree) == ("installed", None)
    assert "no git checkout" in found.summary()[0]


def test_secrets_are_read_from_files_that_only_their_owner_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("FIRST", "OPEN"):
        (tmp_path / name).write_text(f"value of {name}\n")
        (tmp_path / name).chmod(0o600)
    (tmp_path / "OPEN").chmod(0o644)
    with pytest.raises(EnvironmentFault) as refused:
        resolve(["FIRST", "OPEN", "GONE"], "~")
    assert "other users may read" in str(refused.value)
    assert "GONE cannot be read" in str(refused.value)
    assert "value of" not in str(refused.value)
    monkeypatch.delenv("FIRST", raising=False)
    put_into_environment(["FIRST"], "~")
    assert os.environ.pop("FIRST") == "value of FIRST"
