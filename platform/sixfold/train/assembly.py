"""From a recipe to the parts of its training: objective, engines, checkpointer, stream."""

from __future__ import annotations

from pathlib import Path

from pydantic import JsonValue

from sixfold.checkpoint.checkpointer import Checkpointer
from sixfold.checkpoint.ranks import new_group
from sixfold.distributed.process_group import World
from sixfold.engine.averaging_config import PowerAverageConfig
from sixfold.models.trained.network import TrainedNetwork
from sixfold.objectives.contract import Objective, Progress
from sixfold.recipe.recipe import Recipe
from sixfold.recipe.trained import resolve_networks
from sixfold.train.codec_identity import check_codec, check_teachers
from sixfold.train.loop import Training
from sixfold.train.roles import build_roles, checkpoint_of, tracked_roles
from sixfold.train.text_cache import with_cached_text
from sixfold_data.describe import describe
from sixfold_data.stream import TrainStream

_AVERAGE = {"type", "decay", "widths"}
"""The settings of averages that shape what a checkpoint holds."""


def assemble(recipe: Recipe, world: World, *, quarantine: Path | None = None, cache: Path | None = None) -> Training:
    """Build everything that trains, fresh, with the stream at its beginning.

    Args:
        recipe: the resolved recipe.
        world: this rank.
        quarantine: the log of samples that cannot be read.
        cache: folder in which weights are kept that are made for this run.
    """
    info = describe(recipe.data)
    networks = with_cached_text(recipe, resolve_networks(recipe), info)
    check_codec(recipe, networks, info)
    check_teachers(recipe, networks)
    objective: Objective = recipe.objective.load()(recipe.objective, networks)
    parts = build_roles(recipe, objective, networks, world, cache=cache)
    local_batch = recipe.data.global_batch // world.size
    return Training(
        objective=objective,
        engines=parts.engines,
        companions=parts.companions,
        tracked=tracked_roles(objective),
        stream=open_stream(recipe, world, samples=0, quarantine=quarantine),
        progress=progress_at(recipe, samples=0),
        device=world.device,
        seed=recipe.seed,
        global_batch=recipe.data.global_batch,
        micro_batch={role: recipe.engine_of(role).micro_batch or local_batch for role in parts.engines},
        max_consecutive_skips=recipe.train.max_consecutive_skips,
        rank=world.rank,
        ranks=world.size,
    )


def progress_at(recipe: Recipe, samples: int) -> Progress:
    """The progress of a run that has consumed ``samples`` samples."""
    return Progress(samples=samples, step=samples // recipe.data.global_batch, total_steps=recipe.train.steps)


def open_stream(recipe: Recipe, world: World, *, samples: int, quarantine: Path | None) -> TrainStream:
    """Open the training stream after ``samples`` samples; nothing is replayed."""
    return TrainStream(
        recipe.data,
        seed=recipe.seed,
        rank=world.rank,
        world_size=world.size,
        start_samples=samples,
        quarantine_path=quarantine,
    )


def open_snapshots(recipe: Recipe, world: World, directory: Path) -> Checkpointer | None:
    """Open the run's snapshots of averages for saving; None where the recipe keeps none."""
    averages = recipe.train.ema
    if not isinstance(averages, PowerAverageConfig) or not averages.snapshots:
        return None
    # A checkpointer of their own, since they are kept when checkpoints go.
    keep = recipe.train.steps if averages.keep_snapshots is None else averages.keep_snapshots
    retention = recipe.checkpoint.model_copy(update={"keep": keep, "keep_every": None})
    return open_checkpointer(recipe.model_copy(update={"checkpoint": retention}), world, directory)


def open_checkpointer(recipe: Recipe, world: World, directory: Path) -> Checkpointer:
    """Open the run's checkpoints for saving and restoring."""
    return Checkpointer(
        directory,
        recipe.checkpoint,
        group=new_group(recipe.checkpoint),
        rank=world.rank,
        world_size=world.size,
        recipe_hash=recipe.recipe_hash,
        fingerprint=describe(recipe.data).fingerprint,
        settings=identity_of(recipe),
    )


def identity_of(recipe: Recipe) -> dict[str, JsonValue]:
    """The settings a checkpoint is bound to: those that shape its tensors, its randomness or its order of samples.

    Engines, learning rates, lengths and intervals may change when a run is resumed.
    """
    networks = {
        name: _identity_of_trained(network) if isinstance(network, TrainedNetwork) else network.model_dump(mode="json")
        for name, network in resolve_networks(recipe).items()
    }
    settings: dict[str, JsonValue] = {
        "seed": recipe.seed,
        "data.global_batch": recipe.data.global_batch,
        "data.lanes": recipe.data.lane_count,
        "data.sequence_length": recipe.data.sequence_length,
        "objective": recipe.objective.model_dump(mode="json"),
        "optimizer.type": _optimizer_types(recipe),
        "train.ema": None if recipe.train.ema is None else recipe.train.ema.model_dump(mode="json", include=_AVERAGE),
    }
    return settings | {f"networks.{name}": network for name, network in networks.items()}


def _optimizer_types(recipe: Recipe) -> JsonValue:
    """The update rule, which names the optimizer's tensors; by role where the roles differ."""
    types: dict[str, JsonValue] = {role: recipe.optimizer_of(role).type for role in recipe.objective.role_names}
    first, *others = types.values()
    return types if any(other != first for other in others) else first


def _identity_of_trained(network: TrainedNetwork) -> JsonValue:
    """Which weights of another run are meant: training on with others would be another experiment."""
    candidate = checkpoint_of(network)
    return {"run": candidate.manifest.identity.recipe_hash, "role": network.role, "step": candidate.step}
