"""``sixfold run --dry-run``: one step of every role at full size on a fake process group, without its memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sixfold.distributed.randomness import PositionRandom
from sixfold.engine.rehearsal import BatchFields, Rehearsal, rehearse
from sixfold.models.dit.config import DiTConfig
from sixfold.objectives.contract import Batch, Objective, Phase
from sixfold.recipe.checks import check_recipe
from sixfold.recipe.recipe import Recipe

_EAGER_CHECKPOINTING = {"budget": {"activation_checkpointing": "full", "activation_memory_budget": None}}
"""What stands in for a mode that only the compiler has."""


def rehearse_recipe(recipe: Recipe, world_size: int) -> dict[str, Rehearsal]:
    """Run each trainable role's forward, backward and update as rank 0 of ``world_size`` ranks; say what it would hold.

    Neither the data set nor a device is needed: shapes follow from the recipe.

    Raises:
        RecipeError: the recipe does not fit that many ranks.
    """
    check_recipe(recipe, world_size)
    objective: Objective = recipe.objective.load()(recipe.objective, recipe.networks)
    return {
        role: _rehearse_role(recipe, objective, role, world_size)
        for role, part in objective.roles.items()
        if part.kind == "trainable"
    }


def _rehearse_role(recipe: Recipe, objective: Objective, role: str, world_size: int) -> Rehearsal:
    rank_batch = recipe.data.global_batch // world_size
    engine = recipe.engine_of(role)

    def loss(network: nn.Module, fields: Mapping[str, Tensor]) -> Tensor:
        positions = torch.arange(len(next(iter(fields.values()))))
        random = PositionRandom(recipe.seed, positions)
        terms = objective({role: network}, Batch(fields, positions), Phase(name="main", trains=role), random)
        return terms.loss

    return rehearse(
        recipe.networks[objective.roles[role].network],
        # Compilation changes no shape, and fake tensors cannot pass through compiled code.
        engine.model_copy(update={"compile": False, **_EAGER_CHECKPOINTING.get(engine.activation_checkpointing, {})}),
        recipe.optimizer_of(role),
        batch_fields=batch_fields(recipe, min(engine.micro_batch or rank_batch, rank_batch)),
        loss=loss,
        world_size=world_size,
        averaged=recipe.train.ema_decay is not None,
    )


def batch_fields(recipe: Recipe, samples: int) -> BatchFields:
    """Shapes and types of the fields that ``samples`` samples of the recipe have."""
    network = recipe.networks[recipe.objective.network_names[0]]
    if isinstance(network, DiTConfig):
        image = ((samples, network.channels, network.image_size, network.image_size), torch.float32)
        return {"image": image} | ({"label": ((samples,), torch.int64)} if network.classes else {})
    assert recipe.data.sequence_length is not None, "the recipe's checks require it of text"
    tokens = ((samples, recipe.data.sequence_length + 1), torch.int64)
    return {"tokens": tokens, "documents": tokens}
