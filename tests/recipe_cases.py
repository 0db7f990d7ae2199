"""Real recipes on real data, trained through the real loop: what parity, resume and crash tests run on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True, kw_only=True)
class Case:
    """A recipe whose step is made cheap and nothing changed in kind: tests take hundreds of steps.

    Attributes:
        recipe: its name.
        data: the demo data that it trains on, a folder below those of all.
        overrides: what makes it small.
        runs: by name in ``networks``, the folder of the run whose weights it takes, beside the data; see ``case_runs``.
    """

    recipe: str
    data: str
    overrides: tuple[str, ...] = ()
    runs: Mapping[str, str] = field(default_factory=dict)


SMALL_CODEC = (
    "data.global_batch=16",
    "networks.codec.width=8",
    "networks.codec.groups=4",
    "networks.discriminator.width=8",
    "networks.discriminator.groups=4",
    "objective.adversarial.discriminator_from_step=1",
    "objective.adversarial.from_step=3",
)
SMALL_MMDIT = (
    "data.global_batch=16",
    "networks.denoiser.width=32",
    "networks.denoiser.depth=2",
    "networks.denoiser.text_width=16",
    "networks.denoiser.pooled_width=16",
    "networks.text_encoder.width=16",
)
ON_PIXELS = (
    "objective.codec=null",
    "networks.codec=null",
    "networks.denoiser.image_size=16",
    "networks.denoiser.patch_size=4",
    "networks.denoiser.channels=3",
)

RECIPES = {
    "lm/moe-smoke": Case(recipe="lm/moe-smoke", data="stdlib", overrides=("data.sequence_length=64",)),
    "flow/dit-smoke": Case(recipe="flow/dit-smoke", data="digits", overrides=("data.global_batch=64",)),
    "flow/unet-smoke": Case(
        recipe="flow/unet-smoke",
        data="digits",
        overrides=(
            "data.global_batch=32",
            "networks.denoiser.width=16",
            "networks.denoiser.head_width=16",
            "networks.denoiser.groups=4",
            "objective.coupling.type=optimal_transport",
            "objective.coupling.group=4",
        ),
    ),
    # The text encoder trains in the denoiser's phase.
    "flow/mmdit-smoke": Case(recipe="flow/mmdit-smoke", data="scenes", overrides=(*SMALL_MMDIT, *ON_PIXELS)),
    "codec/vq-smoke": Case(
        recipe="codec/vq-smoke", data="digits", overrides=(*SMALL_CODEC, "networks.codec.bottleneck.codes=32")
    ),
}
"""One recipe of each kind that needs no other run."""

LATENT = "flow/mmdit-smoke on latents"
"""Text to image as it is trained in earnest, on what a codec made."""

FURTHER = {
    # With seed 0 a unit of the discriminator comes so near to its kink at step 16 that rounding decides its slope.
    "codec/kl-smoke": Case(recipe="codec/kl-smoke", data="digits", overrides=(*SMALL_CODEC, "seed=1")),
    "codec/fsq-smoke": Case(recipe="codec/fsq-smoke", data="digits", overrides=SMALL_CODEC),
    LATENT: Case(
        recipe="flow/mmdit-smoke",
        data="latents",
        overrides=(*SMALL_MMDIT, "networks.denoiser.image_size=4"),
        runs={"codec": "codec"},
    ),
}
"""Others of the same kinds."""

SMALL_DENOISER = ("width=32", "depth=2", "heads=2", "time_scale=8.0")
"""What the teacher of distilled recipes is, and a student that is no copy of it."""

SMALL_HEADS = ("networks.discriminator.features=32", "objective.read_after=[0, 1]")
FRESH = tuple(f"networks.denoiser.{setting}" for setting in SMALL_DENOISER)
GUIDED = "objective.teacher_guidance=3.0"
"""A copy of its teacher has nothing to learn but rounding: guidance makes the teacher want something else."""


def _few_step(recipe: str, *overrides: str, takes: Sequence[str] = ("teacher", "denoiser")) -> Case:
    return Case(
        recipe=recipe,
        data="digits",
        overrides=("data.global_batch=16", "schedule.warmup_steps=100", *overrides),
        runs=dict.fromkeys(takes, "teacher"),
    )


COARSE_PAIRS = ("objective.pairs.first_steps=2", "objective.pairs.last_steps=2")
FEW_STEP = {
    case.recipe: case
    for case in (
        _few_step("distill/consistency-distill-smoke", *COARSE_PAIRS, GUIDED),
        _few_step("distill/scm-distill-smoke", "objective.warmup_fraction=0.0", GUIDED),
        _few_step("distill/mean-flow-smoke", *FRESH, GUIDED, takes=("teacher",)),
        _few_step("distill/dmd2-smoke", *SMALL_HEADS, GUIDED),
        _few_step("distill/ladd-smoke", *SMALL_HEADS),
    )
}
"""Few-step students of each kind."""

FURTHER_FEW_STEP = {
    case.recipe: case
    for case in (
        _few_step("distill/consistency-train-smoke", *COARSE_PAIRS, takes=("denoiser",)),
        _few_step("distill/ect-smoke", takes=("denoiser",)),
        _few_step("distill/scm-train-smoke", "objective.warmup_fraction=0.0", takes=("denoiser",)),
        _few_step("distill/lcm-smoke", *FRESH, *COARSE_PAIRS, takes=("teacher",)),
        # A difference of two terms: at the recipe's weight it comes near zero, where rounding is a large part of it.
        _few_step("distill/add-smoke", "objective.distillation_weight=10.0"),
        _few_step("distill/mean-flow-scratch-smoke", *FRESH, "schedule.warmup_steps=5", takes=()),
        _few_step("distill/reflow-smoke", GUIDED),
        _few_step("distill/progressive-smoke", GUIDED),
    )
}
"""All the others."""

CASES = {**RECIPES, **FURTHER, **FEW_STEP, **FURTHER_FEW_STEP}
"""Every recipe under test, by the name that tests call it by."""


@cache
def recipe_on(name: str, data: str, *overrides: str) -> Recipe:
    """Load a case's recipe by the case's name, made smaller, on the demo data below the folder ``data``."""
    case = CASES[name]
    runs = [f"networks.{network}.run={data}/{folder}" for network, folder in case.runs.items()]
    return load_recipe(case.recipe, [f"data.path={data}/{case.data}", *runs, *case.overrides, *overrides]).recipe


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


def train_and_save(
    config: Component, name: str, data: str, folder: str, *, until: int, overrides: tuple[str, ...] = ()
) -> list[tuple[float, float]]:
    """Resume the run in ``folder`` if it has a checkpoint, train to step ``until``, save; return losses and norms."""
    world = join()
    recipe = with_engine(recipe_on(name, data, "train.ema={type: constant, decay: 0.9}", *overrides), config, None)
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
