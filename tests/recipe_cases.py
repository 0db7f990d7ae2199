"""Real recipes on real data, trained through the real loop: what parity, resume and crash tests run on every rank."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from parity_matrix import Trajectory
from sixfold.checkpoint.ranks import Ranks
from sixfold.checkpoint.reading import fill, open_reader
from sixfold.checkpoint.verification import newest_verified
from sixfold.config.base import Component
from sixfold.distributed.process_group import join
from sixfold.recipe.load import load_recipe
from sixfold.recipe.recipe import Recipe
from sixfold.train.assembly import assemble, open_checkpointer
from sixfold.train.hooks import SavedExtra
from sixfold.train.loop import Training, train_step
from sixfold.train.run_folder import RunFolder
from sixfold.train.worker import Job

RECIPES = {
    "lm/moe-smoke": "stdlib",
    "flow/dit-smoke": "digits",
    "flow/unet-smoke": "digits",
    "flow/mmdit-smoke": "scenes",
    "codec/vq-smoke": "digits",
}
"""The recipes under test and the demo data each trains on."""

SMALLER = {
    "lm/moe-smoke": ("data.sequence_length=64",),
    "flow/dit-smoke": ("data.global_batch=64",),
    "flow/unet-smoke": (
        "data.global_batch=32",
        "networks.denoiser.width=16",
        "networks.denoiser.head_width=16",
        "networks.denoiser.groups=4",
        "objective.coupling.type=optimal_transport",
        "objective.coupling.group=4",
    ),
    # On pixels, since a codec's run would have to come first; the text encoder trains in the denoiser's phase.
    "flow/mmdit-smoke": (
        "data.global_batch=16",
        "objective.codec=null",
        "networks.codec=null",
        "networks.denoiser.image_size=16",
        "networks.denoiser.patch_size=4",
        "networks.denoiser.channels=3",
        "networks.denoiser.width=32",
        "networks.denoiser.depth=2",
        "networks.denoiser.text_width=16",
        "networks.denoiser.pooled_width=16",
        "networks.text_encoder.width=16",
    ),
    "codec/vq-smoke": (
        "data.global_batch=16",
        "networks.codec.width=8",
        "networks.codec.groups=4",
        "networks.codec.bottleneck.codes=32",
        "networks.discriminator.width=8",
        "networks.discriminator.groups=4",
        "objective.adversarial.discriminator_from_step=1",
        "objective.adversarial.from_step=3",
    ),
}
"""Overrides that make a step cheap and change nothing in kind: tests take hundreds of steps."""


SMALL_DENOISER = ("width=32", "depth=2", "heads=2", "time_scale=8.0")
"""What the teacher of distilled recipes is, and a student that is no copy of it."""

DISTILLED = {
    # A copy of its teacher has nothing to learn but rounding: guidance makes the teacher want something else.
    "distill/consistency-distill-smoke": (
        "objective.pairs.first_steps=2",
        "objective.pairs.last_steps=2",
        "objective.teacher_guidance=3.0",
    ),
    "distill/scm-distill-smoke": ("objective.warmup_fraction=0.0", "objective.teacher_guidance=3.0"),
    "distill/mean-flow-smoke": (
        *(f"networks.denoiser.{setting}" for setting in SMALL_DENOISER),
        "objective.teacher_guidance=3.0",
    ),
    "distill/dmd2-smoke": ("networks.discriminator.features=32", "objective.read_after=[0, 1]"),
    "distill/ladd-smoke": ("networks.discriminator.features=32", "objective.read_after=[0, 1]"),
}
"""Recipes whose teacher :func:`make_teacher` trains, with what makes them fit it."""


@cache
def recipe_on(name: str, data: str, *overrides: str) -> Recipe:
    """Load a recipe by name, made smaller, on the demo data below the folder ``data``."""
    if name in DISTILLED:
        shared = ("data.global_batch=16", f"networks.teacher.run={data}/teacher", "schedule.warmup_steps=100")
        own = () if name == "distill/mean-flow-smoke" else (f"networks.denoiser.run={data}/teacher",)
        return load_recipe(name, [f"data.path={data}/digits", *shared, *own, *DISTILLED[name], *overrides]).recipe
    return load_recipe(name, [f"data.path={data}/{RECIPES[name]}", *SMALLER[name], *overrides]).recipe


def make_teacher(data: Path) -> None:
    """Leave a run of a small flow on the digits in ``data/teacher``, trained for a few steps in this process."""
    folder = data / "teacher"
    if (folder / "recipe.yaml").exists():
        return
    small = [f"networks.denoiser.{setting}" for setting in SMALL_DENOISER]
    overrides = [f"data.path={data}/digits", "data.global_batch=32", "train.ema={type: constant, decay: 0.9}", *small]
    recipe = load_recipe("flow/dit-smoke", overrides).recipe
    run = RunFolder(folder)
    checkpointer = open_checkpointer(recipe, join(), run.checkpoints)
    job = Job(recipe=recipe, world=join(), folder=run, training=assemble(recipe, join()), checkpointer=checkpointer)
    for _ in range(20):
        advance(job.training)
    save(job)
    job.close()
    (folder / "events.jsonl").write_text("")
    (folder / "recipe.yaml").write_text(recipe.dump_yaml())


def with_engine(recipe: Recipe, config: Component, micro_batch: int | None) -> Recipe:
    """Return the recipe on another engine."""
    return recipe.model_copy(update={"engine": config.model_copy(update={"micro_batch": micro_batch})})


def train_recipe(config: Component, accumulation: int, name: str, data: str, steps: int) -> Trajectory:
    """Train ``steps`` steps on the engine, from the beginning; the core of the parity matrix."""
    world = join()
    recipe = recipe_on(name, data)
    local = with_engine(recipe, config, recipe.data.global_batch // world.size // accumulation)
    training = assemble(local, world, cache=made_once(data))
    done = [pair for _ in range(steps) for pair in advance(training)]
    close(training)
    return Trajectory(losses=[loss for loss, _ in done], grad_norms=[norm for _, norm in done])


def made_once(data: str) -> Path:
    """Where weights are kept that a recipe makes from its data, so that tests make them once."""
    return Path(data) / "made-weights"


def advance(training: Training) -> list[tuple[float, float]]:
    """Take one step; return the global mean loss and gradient norm of each phase's roles."""
    record = train_step(training, next(training.stream))
    training.progress = record.progress
    assert not record.skipped
    pairs = []
    for name, report in record.reports.items():
        phase = name.partition("/")[0]
        loss = record.metrics["loss" if phase == "main" else f"{phase}/loss"]
        pairs.append((loss, report.grad_norm))
    return pairs


def close(training: Training) -> None:
    """Release engines and stream."""
    training.close()


def train_and_save(config: Component, name: str, data: str, folder: str, *, until: int) -> list[tuple[float, float]]:
    """Resume the run in ``folder`` if it has a checkpoint, train to step ``until``, save; return losses and norms."""
    world = join()
    recipe = with_engine(recipe_on(name, data, "train.ema={type: constant, decay: 0.9}"), config, None)
    run = RunFolder(Path(folder))
    checkpointer = open_checkpointer(recipe, world, run.checkpoints)
    training = assemble(recipe, world, cache=made_once(data))
    job = Job(recipe=recipe, world=world, folder=run, training=training, checkpointer=checkpointer)
    job.restore(lambda note: None)
    trajectory = [pair for _ in range(until - job.training.progress.step) for pair in advance(job.training)]
    save(job)
    job.close()
    return trajectory


def save(job: Job) -> None:
    """Save now and wait until the checkpoint is committed."""
    states = {role: part.checkpoint_state() for role, part in job.training.saved.items()}
    progress = job.training.progress
    extra = SavedExtra(samples=progress.samples, data=job.training.stream.state())
    job.checkpointer.save(progress.step, states, extra.model_dump(mode="json"))
    job.checkpointer.wait()


def saved_tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Read every tensor of the newest checkpoint, whole: parameters, buffers, optimizer slots, averages."""
    candidate = newest_verified(folder / "checkpoints", print)
    assert candidate is not None
    assert candidate.step == step
    saved = open_reader(candidate, Ranks(None)).tensors()
    state = {key: torch.empty(value.size, dtype=value.properties.dtype) for key, value in saved.items()}
    fill(candidate, state, Ranks(None))
    return state
