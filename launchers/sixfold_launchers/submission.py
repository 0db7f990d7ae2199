"""Submitting: first a plan without any effect, which a dry run prints, then the few steps that carry it out."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sixfold.errors import Fault, RecipeError, SixfoldError, UserError
from sixfold.recipe.checks import check_recipe
from sixfold.recipe.load import LoadedRecipe, load_recipe
from sixfold.train.run_folder import held, new_run_id, prepare_run_folder, take_up
from sixfold_launchers.contract import JobRecord, JobSpec, Launcher, RunSpec, Submission, launcher_of
from sixfold_launchers.job_book import SUBMISSION_TIMEOUT_S, JobBook, reconcile
from sixfold_launchers.profile_files import LoadedProfile
from sixfold_launchers.snapshot import Snapshot, plan_snapshot, record_code, ship

JOBS, CODE = ".jobs", ".code"
"""Folders below a profile's ``runs`` that hold jobs' scripts and logs, and code snapshots."""
AUTO_KEY = "auto"
"""As a key: one made of all that two equal submissions have in common."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A submission that has been thought through: recipes and profile agree, and the text is rendered."""

    loaded: LoadedProfile
    recipes: tuple[LoadedRecipe, ...]
    spec: JobSpec
    snapshot: Snapshot
    launcher: Launcher
    submission: Submission
    named_key: str | None
    resumes: bool

    @property
    def key(self) -> str | None:
        """What makes the submission idempotent."""
        return f"{AUTO_KEY}-{self.digest[:16]}" if self.named_key == AUTO_KEY else self.named_key

    @property
    def digest(self) -> str:
        """Of what makes two submissions the same: recipes, profile, code and the run folder asked for."""
        content = {
            "recipes": [loaded.recipe.recipe_hash for loaded in self.recipes],
            "profile": self.loaded.profile.model_dump(mode="json"),
            "code": self.snapshot.tree,
            "folder": str(self.spec.runs[0].folder) if self.resumes else None,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def plan(
    recipe: str,
    overrides: Sequence[str],
    loaded: LoadedProfile,
    *,
    sweep: Sequence[tuple[str, ...]] = (),
    run_dir: Path | None = None,
    key: str | None = None,
) -> Plan:
    """Think a submission through; nothing is written and no cluster is asked.

    Raises:
        RecipeError: a recipe is malformed, or fits none of the profile's numbers of ranks.
        UserError: the profile or the code cannot be used.
    """
    if sweep and run_dir is not None:
        raise UserError.of("--run-dir names one folder, a sweep has many runs", fix="leave --run-dir out")
    points = sweep or [()]
    recipes = tuple(load_recipe(recipe, [*overrides, *point]) for point in points)
    for each in recipes:
        _check_ranks(each, loaded)
    snapshot = plan_snapshot(loaded.profile.snapshot.policy)
    job_id, root = new_run_id(), Path(loaded.profile.runs).expanduser().absolute()
    folders = _run_folders(recipes, root, run_dir, job_id)
    runs = zip(folders, recipes, points, strict=True)
    spec = JobSpec(
        job_id=job_id,
        folder=root / JOBS / job_id,
        runs=tuple(RunSpec(folder=f, recipe=r.recipe.name, overrides=tuple(p)) for f, r, p in runs),
        directory=Path.cwd(),
        python=loaded.profile.python or sys.executable,
        code=None if snapshot.tree is None else root / CODE / snapshot.name,
    )
    launcher = launcher_of(loaded.profile)
    return Plan(
        loaded=loaded,
        recipes=recipes,
        spec=spec,
        snapshot=snapshot,
        launcher=launcher,
        submission=launcher.render(spec),
        named_key=key,
        resumes=run_dir is not None,
    )


def _run_folders(recipes: Sequence[LoadedRecipe], root: Path, run_dir: Path | None, job_id: str) -> list[Path]:
    if run_dir is not None:
        return [run_dir.expanduser().absolute()]
    suffixes = [""] if len(recipes) == 1 else [f"-{index}" for index in range(len(recipes))]
    return [root / each.recipe.name / f"{job_id}{suffix}" for each, suffix in zip(recipes, suffixes, strict=True)]


def _check_ranks(loaded: LoadedRecipe, profile: LoadedProfile) -> None:
    """Check the recipe for the profile's number of ranks; of an elastic range one that fits is enough."""
    refused: RecipeError | None = None
    for ranks in profile.profile.ranks_allowed():
        try:
            check_recipe(loaded.recipe, ranks, provenance=loaded.provenance)
        except RecipeError as error:
            refused = error
        else:
            return
    assert refused is not None, "a profile allows some number of ranks"
    raise refused


def check(made: Plan) -> list[Fault]:
    """Check what :func:`plan` cannot: the data set, and the cluster's opinion of the job."""
    from sixfold.train.fitting import check_data_fits
    from sixfold_data.describe import describe

    faults: list[Fault] = []
    for loaded in made.recipes:
        try:
            check_data_fits(loaded.recipe, describe(loaded.recipe.data))
        except UserError as error:
            faults.extend(fault for fault in error.faults if fault not in faults)
    return [*faults, *made.launcher.check(made.spec)]


def submit(made: Plan, book: JobBook, *, retry: bool = False) -> tuple[JobRecord, bool]:
    """Carry a plan out; return the job, and whether it is new (else its key had been submitted before).

    With ``retry`` a job of the key that ended unfinished gets another turn.

    Raises:
        UserError: the cluster or a check refuses, another job works on the run, or the key means something else.
        EnvironmentFault: the cluster does not answer, or a folder cannot be written.
    """
    job = JobRecord(
        job_id=made.spec.job_id,
        key=made.key,
        digest=made.digest,
        kind=made.loaded.profile.type,
        cluster_id=None,
        profile_name=made.loaded.name,
        profile=made.loaded.profile,
        spec=made.spec,
        state="submitting",
        submitted_s=time.time(),
    )
    known = book.begin(job)
    if known is not None and not _is_unconfirmed(book, known):
        return _turned(book, known) if retry else book.find(known.job_id), False
    if known is not None:
        book.forget(known.job_id)
        book.begin(job)
    try:
        _refuse_second_job(made, book)
        faults = check(made)
        if faults:
            raise UserError(*faults)
        _prepare(made)
        cluster_id = made.launcher.submit(made.spec, made.submission)
    except (SixfoldError, OSError):
        book.forget(job.job_id)  # nothing reached the cluster: its key is free again
        raise
    return book.update(replace(job, cluster_id=cluster_id, state="pending")), True


def _is_unconfirmed(book: JobBook, job: JobRecord) -> bool:
    """Whether an earlier submission of a key died before the cluster had it.

    Raises:
        UserError: it began so lately that it may still be under way.
    """
    if job.cluster_id is not None:
        return False
    [(now, fault)] = reconcile(book, [job])
    if fault is not None:
        raise fault
    if now.state == "submitting":
        raise UserError.of(
            f"a submission under this key began {time.time() - job.submitted_s:.0f} s ago and has not been confirmed",
            where=f"--key {job.key}",
            fix=f"if it was killed, submit again when {SUBMISSION_TIMEOUT_S:.0f} s have passed",
        )
    return now.cluster_id is None


def _turned(book: JobBook, job: JobRecord) -> JobRecord:
    """The job as it is now, started again if it ended before it was complete."""
    [(now, fault)] = reconcile(book, [job])
    if fault is not None:
        raise fault
    return give_another_turn(book, now) if now.ended and now.state != "finished" else now


def give_another_turn(book: JobBook, job: JobRecord) -> JobRecord:
    """Start a job again: a running one saves first, one that ended resumes from its newest checkpoint.

    Raises:
        UserError: it waits already, or is finished.
    """
    cluster_id = launcher_of(job.profile).requeue(job)
    return book.update(replace(job, cluster_id=cluster_id, state="pending", detail="requeued"))


def _refuse_second_job(made: Plan, book: JobBook) -> None:
    for run in made.spec.runs:
        earlier = [job for job in book.of_run(run.folder) if job.job_id != made.spec.job_id]
        for job, _ in reconcile(book, earlier):
            if not job.ended:
                raise UserError.of(
                    f"job {job.job_id} works on this run ({job.state})",
                    where=str(run.folder),
                    fix=f"follow it with `sixfold jobs logs -f {job.job_id}`, or end it with "
                    f"`sixfold jobs cancel {job.job_id}` first",
                )


def _prepare(made: Plan) -> None:
    """Make the folders: runs with their recipes and code records, the snapshot, the job's files."""
    if made.spec.code is not None:
        ship(made.snapshot, made.spec.code)
    for run, loaded in zip(made.spec.runs, made.recipes, strict=True):
        folder = prepare_run_folder(loaded.recipe, run.folder, resume=True, run_id=run.folder.name)
        with held(folder):
            take_up(folder, loaded.recipe)
        record_code(made.snapshot, folder.path)
    made.spec.logs.mkdir(parents=True, exist_ok=True)  # last: what cannot be prepared leaves no job behind
    for name, content in made.submission.files.items():
        (made.spec.folder / name).write_text(content)
