"""What follows from a recipe and a number of ranks: batches, accumulation, tokens, length of the run."""

from __future__ import annotations

from collections.abc import Iterator

from sixfold.recipe.recipe import Recipe


def tokens_per_sample(recipe: Recipe) -> int | None:
    """Tokens one sample occupies in the objective's first network; None where that is unknown."""
    network = recipe.networks.get(recipe.objective.network_names[0])
    return (None if network is None else network.tokens) or recipe.data.sequence_length


def derived_facts(recipe: Recipe, world_size: int) -> dict[str, int | str]:
    """Facts a reader of the recipe would otherwise compute, by name, in reading order."""
    return dict(_facts(recipe, world_size))


def _facts(recipe: Recipe, world_size: int) -> Iterator[tuple[str, int | str]]:
    rank_batch, tokens = recipe.data.global_batch // world_size, tokens_per_sample(recipe)
    yield "ranks", world_size
    yield "lanes", recipe.data.lane_count
    yield "samples per rank and step", rank_batch
    roles = recipe.objective.role_names
    for role in roles:
        of_role = f" of {role}" if len(roles) > 1 else ""
        micro_batch = min(recipe.engine_of(role).micro_batch or rank_batch, rank_batch)
        yield f"micro-batch{of_role}", micro_batch
        yield f"gradient accumulation{of_role}", -(-rank_batch // micro_batch)
    yield "samples in all", recipe.data.global_batch * recipe.train.steps
    if tokens is not None:
        yield "tokens per sample", tokens
        yield "tokens per step", tokens * recipe.data.global_batch
        yield "tokens in all", tokens * recipe.data.global_batch * recipe.train.steps
    yield "recipe hash", recipe.recipe_hash[:16]
