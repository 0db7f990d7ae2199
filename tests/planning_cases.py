"""A real training step under the meter on a pool's ranks, and the same step planned: what must agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from recipe_cases import close, recipe_on, with_engine
from sixfold.config.base import Component
from sixfold.distributed.process_group import join
from sixfold.planning.meter import Collective, Readings, StepMeter
from sixfold.planning.trace import StepTrace, trace_step
from sixfold.recipe.load import load_recipe
from sixfold.train.assembly import assemble
from sixfold.train.loop import train_step

PLANNED: dict[str, tuple[str, ...]] = {
    "lm/moe-smoke": (),
    "flow/dit-smoke": (),
    "flow/unet-smoke": ("objective.coupling={type: independent}",),  # the other looks at samples, which a plan lacks
    "flow/mmdit-smoke": (),
}
"""Recipes whose plans are compared with runs, with further overrides."""

BUCKET_BYTES = 10**9
"""No tensor of these recipes is as large; DeepSpeed's buckets for messages are."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one rank did: bytes that building left in memory, and the readings of the second step."""

    held_bytes: int
    step: Readings


def measure(config: Component, name: str, data: str, micro_batch: int | None) -> Measured:
    """Take two real steps of a recipe on this rank."""
    world = join()
    recipe = with_engine(recipe_on(name, data, *PLANNED[name]), config, micro_batch)
    with StepMeter() as building:
        training = assemble(recipe, world)
        training.progress = train_step(training, next(training.stream)).progress
        held = building.readings().left_bytes
    with StepMeter() as stepping:
        train_step(training, next(training.stream))
    close(training)
    for number, change in stepping._timeline:
        if change >= BUCKET_BYTES:
            stepping._uses[number] = "exchange"  # stage 2 sends copies of its bucket, so that the meter cannot tell
    return Measured(held_bytes=held, step=stepping.readings())


def traced(config: Component, name: str, data: str, micro_batch: int | None, world_size: int) -> StepTrace:
    """Trace the same recipe on fake tensors; for a process that belongs to no group."""
    return trace_step(with_engine(recipe_on(name, data, *PLANNED[name]), config, micro_batch), world_size)


def traced_recipe(name: str, overrides: tuple[str, ...], world_size: int) -> StepTrace:
    """Trace a recipe by name."""
    return trace_step(load_recipe(name, list(overrides)).recipe, world_size)


def payload(collectives: Mapping[Collective, float]) -> dict[str, int]:
    """Bytes by kind, without flags and norms of a few bytes, and without what only the first steps broadcast."""
    totals: dict[str, int] = {}
    for message, times in collectives.items():
        if message.message_bytes > 64 and message.kind != "broadcast":
            totals[message.kind] = totals.get(message.kind, 0) + message.message_bytes * round(times)
    return totals
