"""``sixfold run --dry-run``: one step of every role at full size on a fake process group, without its memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sixfold.distributed.randomness import PositionRandom
from sixfold.engine.rehearsal import BatchFields, Rehearsal, rehearse, rehearse_untrained
from sixfold.models.settings import SampleLengths
from sixfold.models.trained.network import NetworksConfig, architecture_of
from sixfold.objectives.contract import Batch, Objective, Phase, Progress
from sixfold.recipe.checks import check_recipe
from sixfold.recipe.recipe import Recipe
from sixfold.recipe.trained import resolve_networks
from sixfold.train.codec_identity import check_teachers
from sixfold.train.roles import names_of, settings_of

_EAGER_CHECKPOINTING = {"budget": {"activation_checkpointing": "full", "activation_memory_budget": None}}
"""What stands in for a mode that only the compiler has."""


def rehearse_recipe(recipe: Recipe, world_size: int) -> dict[str, Rehearsal]:
    """Run each trainable role's forward, backward and update as rank 0 of ``world_size`` ranks; say what it would hold.

    The roles that nothing trains follow, with what the rank would hold of them. Neither the data set nor a device is
    needed: shapes follow from the recipe.

    Raises:
        RecipeError: the recipe does not fit that many ranks.
    """
    check_recipe(recipe, world_size)
    networks = resolve_networks(recipe, planning=True)
    check_teachers(recipe, networks)
    objective: Objective = recipe.objective.load()(recipe.objective, networks)
    trainable = names_of(objective, "trainable")
    trained = {role: _rehearse_role(recipe, objective, networks, role, world_size) for role in trainable}
    return trained | {
        role: rehearse_untrained(
            settings_of(networks, part), recipe.engine_of(part.follows or trainable[0]), world_size=world_size
        )
        for role, part in objective.roles.items()
        if role not in trained
    }


def _rehearse_role(
    recipe: Recipe, objective: Objective, networks: NetworksConfig, role: str, world_size: int
) -> Rehearsal:
    rank_batch = recipe.data.global_batch // world_size
    engine = recipe.engine_of(role)
    phase = _phase_that_trains(objective, role, recipe.train.steps)

    def loss(network: nn.Module, others: Mapping[str, nn.Module], fields: Mapping[str, Tensor]) -> Tensor:
        positions = torch.arange(len(next(iter(fields.values()))))
        random = PositionRandom(recipe.seed, positions)
        return objective({**others, role: network}, Batch(fields, positions), phase, random).loss

    return rehearse(
        settings_of(networks, objective.roles[role]),
        # Compilation changes no shape, and fake tensors cannot pass through compiled code.
        engine.model_copy(update={"compile": False, **_EAGER_CHECKPOINTING.get(engine.activation_checkpointing, {})}),
        recipe.optimizer_of(role),
        batch_fields=batch_fields(recipe, networks, min(engine.micro_batch or rank_batch, rank_batch)),
        loss=loss,
        world_size=world_size,
        average=recipe.train.ema,
        others={name: settings_of(networks, part) for name, part in objective.roles.items() if name != role},
    )


def _phase_that_trains(objective: Objective, role: str, total_steps: int) -> Phase:
    """A phase that trains the role, late in training, when every term has begun."""
    late = range(total_steps - 1, -1, -1)
    plans = (objective.phases(Progress(samples=0, step=step, total_steps=total_steps)) for step in late)
    return next(phase for phases in plans for phase in phases if role in phase.trains)


def batch_fields(recipe: Recipe, networks: NetworksConfig, samples: int) -> BatchFields:
    """Shapes and types of the fields that ``samples`` samples of the recipe have."""
    lengths = SampleLengths(recipe.data.sequence_length, recipe.data.caption_length)
    fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    read = [network for name, network in networks.items() if name != recipe.objective.latents_of]
    for network in map(architecture_of, read):
        for name, field in network.inputs(lengths).items():
            fields[name] = ((samples, *field.shape), getattr(torch, field.dtype))
    return fields
