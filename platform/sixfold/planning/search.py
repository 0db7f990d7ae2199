"""The cheapest setting that fits: sharding, micro-batch, activation checkpointing and offload, tried on paper.

One trace a mode of checkpointing is enough to compare: activations grow with the micro-batch, gathered blocks do not
depend on how many ranks share them, and what is kept and sent between steps follows from shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from sixfold.engine.config import DDPConfig, DeepSpeedConfig, EngineConfig, FSDPConfig
from sixfold.errors import RecipeError
from sixfold.planning.meter import Collective, Use
from sixfold.planning.partition import sent_by_replica
from sixfold.planning.trace import StepTrace, add_up, held_by_roles
from sixfold.recipe.checks import check_recipe
from sixfold.recipe.recipe import Recipe


def with_engine(recipe: Recipe, engine: EngineConfig) -> Recipe:
    """The recipe with one engine for all its roles."""
    roles = {name: part.model_copy(update={"engine": None}) for name, part in recipe.roles.items()}
    return recipe.model_copy(update={"engine": engine, "roles": roles})


def is_accepted(recipe: Recipe, ranks: int) -> bool:
    """Whether a recipe may run on so many ranks: some objectives bound the micro-batch, some groups do not divide."""
    try:
        check_recipe(recipe, ranks)
    except RecipeError:
        return False
    return True


def candidates(engine: EngineConfig, *, ranks: int, ranks_per_node: int, rank_batch: int) -> Iterator[EngineConfig]:
    """Engines of the same kind in every sharding and micro-batch, with the given mode of checkpointing."""
    for sharded in _shardings(engine, ranks=ranks, ranks_per_node=ranks_per_node):
        for micro_batch in (n for n in range(rank_batch, 0, -1) if rank_batch % n == 0):  # of equals, the largest
            yield sharded.model_copy(update={"micro_batch": micro_batch})


def _shardings(engine: EngineConfig, *, ranks: int, ranks_per_node: int) -> Iterator[EngineConfig]:
    if isinstance(engine, FSDPConfig):
        groups = {ranks, min(ranks, ranks_per_node), ranks // engine.replicate}
        groups |= {ranks_per_node << doubling for doubling in range(12) if ranks % (ranks_per_node << doubling) == 0}
        for shards in sorted(group for group in groups if ranks % group == 0):
            yield engine.model_copy(update={"replicate": ranks // shards})
    elif isinstance(engine, DeepSpeedConfig):
        for stage in (1, 2, 3):
            for offload in (False, True):
                yield engine.model_copy(update={"zero_stage": stage, "offload_optimizer": offload})
    else:
        assert isinstance(engine, DDPConfig)
        yield engine


def rescaled(trace: StepTrace, recipe: Recipe, engine: EngineConfig, *, ranks: int, device: torch.device) -> StepTrace:
    """What the trace of ``recipe`` would be on ``engine``, which is of the same kind and mode of checkpointing."""
    rank_batch = recipe.data.global_batch // ranks
    micro_batch = engine.micro_batch or rank_batch
    growth = micro_batch / trace.micro_batch
    changed = with_engine(recipe, engine)
    if isinstance(engine, FSDPConfig):
        before = recipe.engine
        assert isinstance(before, FSDPConfig)
        collectives: Mapping[Collective, float] = _resharded(
            trace.collectives,
            before.replicate,
            engine.replicate,
            ranks=ranks,
            growth=growth,
            sums=trace.micro_batch / rank_batch,
        )
    else:
        times = rank_batch // micro_batch
        collectives = add_up(
            (1.0, sent_by_replica(shapes, engine, world_size=ranks, device=device, micro_batches=times))
            for shapes in trace.shapes.values()
        )
    held = held_by_roles(changed, trace.shapes, ranks, device)
    return replace(
        trace,
        most=_grown(trace.most, growth),
        at_peak={**_grown(trace.besides_gradients, growth), "gradients": held.gradients},
        held=held,
        collectives=collectives,
        micro_batch=micro_batch,
    )


def _grown(sizes: Mapping[Use, int], growth: float) -> dict[Use, int]:
    """Activations grow with the micro-batch."""
    return {use: round(size * growth) if use == "activations" else size for use, size in sizes.items()}


def _resharded(
    collectives: Mapping[Collective, float], before: int, after: int, *, ranks: int, growth: float, sums: float
) -> dict[Collective, float]:
    """Gathers and scatters go to the new shard group, once a micro-batch; replicas sum their new shards once a step."""
    shards = ranks // after
    group, replicas = tuple(range(shards)), tuple(range(0, ranks, shards))
    result: dict[Collective, float] = {}
    for message, times in collectives.items():
        if message.kind in ("all_gather", "reduce_scatter") and len(message.ranks) == ranks // before:
            result[replace(message, ranks=group)] = times / growth
            if message.kind == "reduce_scatter" and after > 1:
                whole = Collective(kind="all_reduce", ranks=replicas, message_bytes=message.message_bytes // shards)
                result[whole] = times * sums
        elif len(message.ranks) == ranks:
            result[message] = times
    return result
