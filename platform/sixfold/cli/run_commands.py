"""``sixfold run``, ``sample`` and ``export``: what trains and uses a model on this machine."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sixfold.cli.outcome import exit_code_of, fail

if TYPE_CHECKING:
    from sixfold.pipeline.runner import PlannedStage
    from sixfold.recipe.recipe import Recipe

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or a name from `sixfold recipes`.")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.steps=100.")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder or a run id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("run")(run)
    app.command("sample")(sample)
    app.command("export")(export)


def run(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks to start on this machine.")] = 1,
    run_dir: Annotated[Path | None, typer.Option(help="Run folder; a new one under runs/ by default.")] = None,
    resume: Annotated[
        str, typer.Option(help="auto continues a run that --run-dir holds; never refuses to.", metavar="auto|never")
    ] = "auto",
    max_restarts: Annotated[int, typer.Option(min=0, help="Fresh starts after a rank was killed.")] = 0,
    dry_run: Annotated[bool, typer.Option(help="Rehearse on a fake process group of --world-size ranks.")] = False,
    world_size: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks of the rehearsal.", show_default="512, or as many as can share the batch"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what --dry-run found as one JSON object.")] = False,
) -> None:
    """Train a recipe, or run a pipeline's stages, on this machine.

    Of a pipeline, stages.NAME=null leaves a stage out, stages.NAME.enabled=true runs one that is off by default, and
    all_stages=true runs all; --dry-run lists them.

    Example: sixfold run flow/dit-smoke train.steps=200 --nproc 2
    """
    from sixfold.errors import UserError
    from sixfold.pipeline.load import is_pipeline
    from sixfold.recipe.catalogue import find_recipe
    from sixfold.recipe.checks import check_recipe
    from sixfold.recipe.load import load_recipe

    source = find_recipe(recipe)
    if resume not in ("auto", "never"):
        raise UserError.of(f"--resume is {resume!r}", allowed="auto, never")
    if as_json and not dry_run:
        raise UserError.of(
            "--json tells what --dry-run found; a run's record is its folder", fix="add --dry-run, or read events.jsonl"
        )
    if is_pipeline(source):
        _run_pipeline(source, overrides or [], run_dir, dry_run=dry_run, as_json=as_json)
        return
    loaded = load_recipe(recipe, overrides or [])
    rehearsed = world_size or math.gcd(512, loaded.recipe.data.lane_count)
    check_recipe(loaded.recipe, rehearsed if dry_run else nproc, provenance=loaded.provenance)
    if dry_run:
        _rehearse(loaded.recipe, rehearsed, as_json=as_json)
        return

    from sixfold.tracking.events import last_status
    from sixfold.train.fitting import check_data_fits
    from sixfold.train.run_folder import held, prepare_run_folder, take_up
    from sixfold_data.describe import describe
    from sixfold_launchers.local import launch

    check_data_fits(loaded.recipe, describe(loaded.recipe.data))
    folder = prepare_run_folder(loaded.recipe, run_dir, resume=resume == "auto")
    with held(folder) as lock:
        take_up(folder, loaded.recipe)
        typer.echo(f"{loaded.recipe.name}: run {folder.run_id} in {folder.path}")
        outcome = launch(folder.path, ranks=nproc, max_restarts=max_restarts, inherited=(lock,))
    if outcome.exit_code:
        fail(folder, outcome)
    if last_status(folder.path) == "interrupted":
        typer.echo("interrupted and saved; the same command with this --run-dir goes on", err=True)
        raise typer.Exit(1)


def _run_pipeline(source: Path, overrides: list[str], run_dir: Path | None, *, dry_run: bool, as_json: bool) -> None:
    """Run a pipeline's stages in turn; its folder is ``runs/<name>`` by default, so that running again goes on."""
    from sixfold.pipeline.load import load_pipeline
    from sixfold.pipeline.runner import plan, run_pipeline
    from sixfold.tracking.runs import RUNS

    pipeline = load_pipeline(source, overrides)
    root = run_dir if run_dir is not None else RUNS / pipeline.name
    if dry_run:
        _print_stages(plan(pipeline, root), pipeline.left_out, as_json=as_json)
        return
    code = run_pipeline(pipeline, root, typer.echo)
    if code:
        raise typer.Exit(exit_code_of(code))


def _print_stages(stages: Sequence[PlannedStage], left_out: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        records = [
            {
                "name": stage.name,
                "key": stage.key,
                "folder": str(stage.folder),
                "finished": stage.finished,
                "command": stage.command,
            }
            for stage in stages
        ]
        typer.echo(json.dumps({"stages": records, "left_out": left_out}))
        return
    for stage in stages:
        typer.echo(f"{stage.name}: {'finished, in' if stage.finished else 'would make'} {stage.folder}")
        typer.echo(f"  sixfold {' '.join(stage.command)}")
    if left_out:
        typer.echo(f"left out: {', '.join(left_out)} (stages.<name>.enabled=true runs one, all_stages=true every one)")


def _rehearse(recipe: Recipe, world_size: int, *, as_json: bool) -> None:
    from sixfold.cli.screen import print_table
    from sixfold.train.rehearsal import rehearse_recipe

    roles = rehearse_recipe(recipe, world_size)
    if as_json:
        found = {role: asdict(rehearsal) for role, rehearsal in roles.items()}
        typer.echo(json.dumps({"recipe": recipe.name, "world_size": world_size, "roles": found}))
        return
    rows = [
        (
            role,
            f"{found.parameters:,}",
            *(
                f"{size / 2**20:,.1f}"
                for size in (found.parameter_bytes, found.gradient_bytes, found.optimizer_bytes, found.average_bytes)
            ),
        )
        for role, found in roles.items()
    ]
    headings = ("role", "parameters", "parameters MiB", "gradients MiB", "optimizer MiB", "average MiB")
    print_table(f"{recipe.name} on {world_size} ranks: one step rehearsed; held by each rank", headings, rows)


def sample(
    run: RunArgument,
    n: Annotated[int, typer.Option("--n", min=1, help="How many samples.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps, or new tokens.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Another type of sampler, such as dpm_solver.")] = None,
    guidance: Annotated[
        str | None, typer.Option(metavar="[TYPE:]SCALE", help="none, a scale, a type, or both: cfg_zero:2.")
    ] = None,
    guide: Annotated[
        str | None, typer.Option(metavar="RUN[@STEP]", help="Weaker network to guide away from (autoguidance).")
    ] = None,
    label: Annotated[
        str | None, typer.Option("--class", "--label", help="Class to draw, by number or name; by default all in turn.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text that samples continue, or show.")] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Write the picture grid alone, not every sample.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; by default samples/ in the run folder.")] = None,
    shards: Annotated[
        Path | None, typer.Option(help="Write a data set of shards to this new folder, instead of single files.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw samples from a run's newest checkpoint, on its averaged weights where there are any.

    Example: sixfold sample runs/smoke/dit --n 40 --sampler dpm_solver --steps 20 --guidance 2 --out pictures
    """
    from sixfold.tracking.runs import find_run
    from sixfold.train.sampling import SampleOptions, sample_run

    options = SampleOptions(
        count=n,
        seed=seed,
        steps=steps,
        sampler=sampler,
        guidance=guidance,
        guide=guide,
        label=label,
        prompt=prompt,
        grid_only=grid,
        out=out,
        shards=shards,
    )
    written = sample_run(find_run(run), options)
    if as_json:
        typer.echo(json.dumps({"files": [str(path) for path in written.files], "step": written.step}))
        return
    for line in written.preview:
        typer.echo(line)
    typer.echo(f"{n} samples of step {written.step} in {written.folder}")


def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="File to write; must not exist.")],
    averaged: Annotated[bool, typer.Option(help="The averaged weights, where the run keeps them.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Write a run's newest weights as one safetensors file.

    Example: sixfold export runs/smoke/dit --out dit.safetensors
    """
    from sixfold.tracking.runs import find_run
    from sixfold.train.inference import export_run

    files = export_run(find_run(run), out=out, averaged=averaged)
    if as_json:
        typer.echo(json.dumps({"files": [str(path) for path in files]}))
        return
    for path in files:
        typer.echo(f"wrote {path}")
