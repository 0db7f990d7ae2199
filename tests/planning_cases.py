"""A real training step under the meter on a pool's ranks, and the same step planned: what must agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from recipe_cases import LATENT, close, made_once, recipe_on, with_engine
from sixfold.config.base import Component
from sixfold.distributed.process_group import join
from sixfold.engine.fsdp import forget_gathered
from sixfold.planning.meter import USES, Collective, Readings, StepMeter, Use
from sixfold.planning.trace import StepTrace, add_up, trace_step
from sixfold.recipe.load import load_recipe
from sixfold.train.assembly import assemble
from sixfold.train.loop import Training, train_step

PLANNED: dict[str, tuple[str, ...]] = {
    "lm/moe-smoke": (),
    "flow/dit-smoke": (),
    "flow/unet-smoke": ("objective.coupling={type: independent}",),  # the other looks at samples, which a plan lacks
    "flow/mmdit-smoke": (),
}
"""Recipes of one phase whose plans are compared with runs, with further overrides."""

PHASED: dict[str, int] = {
    "codec/kl-smoke": 1,
    LATENT: 1,
    "distill/consistency-distill-smoke": 1,
    "distill/dmd2-smoke": 2,
    "distill/ladd-smoke": 1,
}
"""Recipes of several roles, and the steps after which their phases repeat."""

BUCKET_BYTES = 10**9
"""No tensor of these recipes is as large; DeepSpeed's buckets for messages are."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one rank did: bytes that building left in memory, and what a step took on average, once all terms count."""

    held_bytes: int
    most: Mapping[Use, int]
    peak_bytes: int
    flops: float
    collectives: Mapping[Collective, float]


def measure(config: Component, name: str, data: str, micro_batch: int | None) -> Measured:
    """Take a real first step of a recipe on this rank, then the last ones: a cycle unmetered, so that every network
    was called before, one that is metered, and one more for its memory."""
    world = join()
    cycle = PHASED.get(name, 1)
    recipe = with_engine(recipe_on(name, data, *PLANNED.get(name, ())), config, micro_batch)
    with StepMeter() as building:
        training = assemble(recipe, world, cache=made_once(data))
        training.progress = train_step(training, next(training.stream)).progress
        held = building.readings().left_bytes
    late = training.progress.total_steps - 3 * cycle
    training.progress = replace(training.progress, step=late - late % cycle)
    _, readings = ([_step(training) for _ in range(cycle)] for _ in range(2))
    for network in training.bare_networks.values():
        forget_gathered(network)  # or what a frozen network keeps gathered would count as there before
    cold = [_step(training) for _ in range(cycle)]
    close(training)
    return Measured(
        held_bytes=held,
        most={use: max(step.most[use] for step in readings) for use in USES},
        peak_bytes=max(step.peak_bytes for step in cold),
        flops=sum(step.flops for step in readings) / cycle,
        collectives=add_up((1 / cycle, step.collectives) for step in readings),
    )


def _step(training: Training) -> Readings:
    with StepMeter() as stepping:
        training.progress = train_step(training, next(training.stream)).progress
    for number, change in stepping._timeline:
        if change >= BUCKET_BYTES:
            stepping._uses[number] = "exchange"  # stage 2 sends copies of its bucket, so that the meter cannot tell
    return stepping.readings()


def traced(config: Component, name: str, data: str, micro_batch: int | None, world_size: int) -> StepTrace:
    """Trace the same recipe on fake tensors; for a process that belongs to no group."""
    return trace_step(with_engine(recipe_on(name, data, *PLANNED.get(name, ())), config, micro_batch), world_size)


def traced_recipe(name: str, overrides: tuple[str, ...], world_size: int) -> StepTrace:
    """Trace a recipe by name."""
    return trace_step(load_recipe(name, list(overrides)).recipe, world_size)


def payload(collectives: Mapping[Collective, float]) -> dict[str, float]:
    """Bytes by kind, without flags and norms of a few bytes, and without what only the first steps broadcast."""
    totals: dict[str, float] = {}
    for message, times in collectives.items():
        if message.message_bytes > 64 and message.kind != "broadcast":
            totals[message.kind] = totals.get(message.kind, 0.0) + message.message_bytes * times
    return totals
