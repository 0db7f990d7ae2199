"""``sixfold submit`` and ``sixfold jobs``: the same recipe on a cluster, and what became of it."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sixfold.cli.run_commands import JsonOption, OverridesArgument, RecipeArgument

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sixfold_launchers.contract import JobRecord
    from sixfold_launchers.submission import Plan

JobArgument = Annotated[
    str, typer.Argument(metavar="JOB", help="A job id, its beginning, its key or the cluster's id.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("submit")(submit)
    jobs = typer.Typer(help="What became of submitted jobs.", no_args_is_help=True)
    jobs.command("list")(list_jobs)
    jobs.command("show")(show)
    jobs.command("logs")(logs)
    jobs.command("cancel")(cancel)
    jobs.command("requeue")(requeue)
    jobs.command("profiles")(profiles)
    app.add_typer(jobs, name="jobs")


def submit(
    recipe: RecipeArgument,
    to: Annotated[str, typer.Option("--to", metavar="PROFILE", help="A profile file, or a name from `jobs profiles`.")],
    overrides: OverridesArgument = None,
    settings: Annotated[
        list[str] | None, typer.Option("--with", metavar="KEY=VALUE", help="Override the profile, such as nodes=4.")
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Run folder to start or continue; a new one by default.")] = None,
    array: Annotated[
        Path | None, typer.Option(metavar="SWEEP.yaml", help="A sweep: one run for each of its points.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Submit at most once under this key; auto: per recipe, profile, code and folder.")
    ] = None,
    retry: Annotated[bool, typer.Option(help="If the key's job ended unfinished, give it another turn.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Print exactly what would be submitted, and check it.")] = False,
    follow: Annotated[bool, typer.Option(help="Show the log until the job has ended; requeue it if need be.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Submit a recipe to where a profile says: this machine, Slurm, Ray, or Ray inside Slurm.

    Example: sixfold submit lm/moe-smoke --to slurm train.steps=100 --with nodes=2 --dry-run
    """
    from sixfold.errors import UserError
    from sixfold_launchers.job_book import JobBook
    from sixfold_launchers.profile_files import load_profile
    from sixfold_launchers.submission import plan
    from sixfold_launchers.submission import submit as carry_out
    from sixfold_launchers.sweep import load_sweep

    sweep = [] if array is None else load_sweep(array)
    loaded = load_profile(to, settings or [])
    made = plan(recipe, overrides or [], loaded, sweep=sweep, run_dir=run_dir, key=key)
    if retry and key is None:
        raise UserError.of("--retry has no key to go by", where="--key", fix="name one, or let it be made: --key auto")
    if dry_run:
        _show_plan(made, as_json=as_json)
        return
    job, is_new = carry_out(made, JobBook(), retry=retry)
    if as_json:
        typer.echo(json.dumps({**_described(job), "new": is_new}))
    elif is_new:
        _announce(job, [*made.submission.notes, *made.snapshot.summary()])
    else:
        typer.echo(
            f"job {job.job_id} was submitted under this key before; it is {job.state}"
            + (f" ({job.detail})" if job.detail else "")
        )
    if follow:
        _follow(job)


def _show_plan(made: Plan, *, as_json: bool) -> None:
    """Print what would be submitted, then what the cluster thinks of it; where none answers, only the former."""
    from sixfold.errors import EnvironmentFault, UserError
    from sixfold_launchers.submission import check

    notes = [*made.submission.notes, *made.snapshot.summary()]
    if not as_json:
        typer.echo(made.submission.text())
        for note in notes:
            typer.echo(f"# {note}")
    faults, unchecked = [], None
    try:
        faults = check(made)
    except EnvironmentFault as fault:
        unchecked = str(fault)
    if as_json:
        plain = {
            "files": dict(made.submission.files),
            "command": list(made.submission.command),
            "notes": notes,
            "faults": [str(fault) for fault in faults],
            "unchecked": unchecked,
        }
        typer.echo(json.dumps(plain))
    if faults:
        raise UserError(*faults)
    if not as_json:
        typer.echo("# checked: it would be accepted" if unchecked is None else f"# not checked: {unchecked}")


def _announce(job: JobRecord, notes: Iterable[str]) -> None:
    typer.echo(f"job {job.job_id} is {job.cluster_id} on {job.profile_name}")
    for note in notes:
        typer.echo(f"  {note}")
    for run in job.spec.runs:
        typer.echo(f"  run {run.folder}" + (f"  {' '.join(run.overrides)}" if run.overrides else ""))
    typer.echo(f"  log: sixfold jobs logs -f {job.job_id}")


def _follow(job: JobRecord) -> None:
    """Show the log until the job has ended, and give it another turn where its node could not ask for one."""
    from sixfold_launchers.contract import launcher_of
    from sixfold_launchers.job_book import JobBook
    from sixfold_launchers.submission import give_another_turn

    book, launcher = JobBook(), launcher_of(job.profile)
    while True:
        for piece in launcher.logs(job, follow=True):
            typer.echo(piece, nl=False)
        job = _now(book, [job])[0]
        if job.state != "interrupted":
            break
        job = give_another_turn(book, job)
    typer.echo(f"job {job.job_id} {job.state}" + (f": {job.detail}" if job.detail else ""), err=True)
    if job.state != "finished":
        raise typer.Exit(1)


def list_jobs(
    all_jobs: Annotated[bool, typer.Option("--all", help="Jobs that ended more than a week ago, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the jobs submitted from here, newest first, as their clusters see them now.

    Example: sixfold jobs list
    """
    from sixfold.cli.screen import print_table
    from sixfold_launchers.job_book import JobBook

    book = JobBook()
    week_ago = time.time() - 7 * 86400
    jobs = _now(book, [job for job in book.jobs() if all_jobs or not job.ended or job.updated_s > week_ago])
    if as_json:
        typer.echo(json.dumps([_described(job) for job in jobs]))
        return
    if not jobs:
        typer.echo("no jobs; submit one with `sixfold submit RECIPE --to PROFILE`")
        return
    rows = [
        (
            job.job_id,
            job.profile_name,
            job.cluster_id or "",
            job.spec.runs[0].recipe + (f" x {len(job.spec.runs)}" if len(job.spec.runs) > 1 else ""),
            job.state,
            str(job.restarts),
            job.detail,
        )
        for job in jobs
    ]
    print_table(None, ("job", "profile", "cluster id", "recipe", "state", "restarts", "detail"), rows)


def show(job: JobArgument, as_json: JsonOption = False) -> None:
    """Show one job: its state, runs, code and files.

    Example: sixfold jobs show 20260131-235959-1a2b
    """
    from sixfold_launchers.job_book import JobBook

    book = JobBook()
    now = _now(book, [book.find(job)])[0]
    described = _described(now)
    if as_json:
        typer.echo(json.dumps(described))
        return
    for name, value in described.items():
        shown = ", ".join(str(each) for each in value) if isinstance(value, list) else value
        typer.echo(f"{name:12} {shown}")


def logs(
    job: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line of the log.")] = False,
) -> None:
    """Print a job's log.

    Example: sixfold jobs logs -f 20260131-235959-1a2b
    """
    from sixfold_launchers.contract import launcher_of
    from sixfold_launchers.job_book import JobBook

    book = JobBook()
    found = _now(book, [book.find(job)])[0]
    for piece in launcher_of(found.profile).logs(found, follow=follow):
        if as_json:
            for line in piece.splitlines():
                typer.echo(json.dumps({"job_id": found.job_id, "line": line}))
        else:
            typer.echo(piece, nl=False)


def cancel(job: JobArgument, as_json: JsonOption = False) -> None:
    """End a job; its ranks save at the next step boundary where the cluster grants them the time.

    Example: sixfold jobs cancel 20260131-235959-1a2b
    """
    from sixfold.errors import UserError
    from sixfold_launchers.contract import launcher_of
    from sixfold_launchers.job_book import JobBook

    book = JobBook()
    found = _now(book, [book.find(job)])[0]
    if found.ended:
        raise UserError.of(f"job {found.job_id} is {found.state} already", where="JOB", fix="nothing to do")
    launcher_of(found.profile).cancel(found)
    now = _now(book, [found])[0]
    typer.echo(json.dumps(_described(now)) if as_json else f"job {found.job_id}: told to end; it is {now.state}")


def requeue(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="A job; or --interrupted for all of them.")] = None,
    interrupted: Annotated[bool, typer.Option(help="Every job that saved and waits for another turn.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Give a job another turn: a running one saves first, one that ended resumes from its newest checkpoint.

    Example: sixfold jobs requeue 20260131-235959-1a2b
    """
    from sixfold.errors import UserError
    from sixfold_launchers.job_book import JobBook
    from sixfold_launchers.submission import give_another_turn

    if (job is None) != interrupted:
        raise UserError.of("name a job, or all with --interrupted", allowed="one of the two", fix="sixfold jobs list")
    book = JobBook()
    found = [book.find(job)] if job is not None else book.jobs()
    now = _now(book, found)
    turned = [give_another_turn(book, each) for each in now if job is not None or each.state == "interrupted"]
    if as_json:
        typer.echo(json.dumps([_described(each) for each in turned]))
        return
    for each in turned:
        typer.echo(f"job {each.job_id} is {each.cluster_id} on {each.profile_name}: {each.state}")


def profiles(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help="Describe the settings of one kind.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the profiles that can be submitted to, or the settings that one kind of profile has.

    Example: sixfold jobs profiles slurm
    """
    from sixfold.cli.screen import print_table
    from sixfold.errors import UserError
    from sixfold_launchers.profile_files import describe_kind, summarise_profiles
    from sixfold_launchers.profiles import KINDS

    if kind is not None and kind not in KINDS:
        raise UserError.of(f"there is no kind {kind!r}", where="KIND", allowed=", ".join(KINDS))
    rows = summarise_profiles() if kind is None else describe_kind(kind)
    if as_json:
        typer.echo(json.dumps(rows))
        return
    print_table(None, list(rows[0]) if rows else ["name"], [tuple(row.values()) for row in rows])


def _now(book: Any, jobs: Sequence[JobRecord]) -> list[JobRecord]:
    """Reconcile jobs with their clusters; a cluster that is away is reported once, and its jobs keep their state."""
    from sixfold_launchers.job_book import reconcile

    found, said = [], set()
    for job, fault in reconcile(book, jobs):
        if fault is not None and str(fault) not in said:
            said.add(str(fault))
            print(f"warning: {fault}", file=sys.stderr)
        found.append(job if fault is None else replace(job, detail="last known; its cluster does not answer"))
    return found


def _described(job: JobRecord) -> dict[str, Any]:
    """A job as plain data."""
    return {
        "job_id": job.job_id,
        "key": job.key,
        "state": job.state,
        "detail": job.detail,
        "restarts": job.restarts,
        "kind": job.kind,
        "profile": job.profile_name,
        "cluster_id": job.cluster_id,
        "nodes": list(job.nodes),
        "runs": [str(run.folder) for run in job.spec.runs],
        "recipe": job.spec.runs[0].recipe,
        "folder": str(job.spec.folder),
        "logs": str(job.spec.logs),
        "code": None if job.spec.code is None else str(job.spec.code),
        "submitted_s": job.submitted_s,
    }
