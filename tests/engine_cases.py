"""Training the toy network on any engine, here or on a pool's ranks: what parity and state tests are made of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from parity_matrix import Trajectory
from sixfold.distributed.collectives import sum_over_ranks
from sixfold.distributed.process_group import World
from sixfold.engine.averaging_config import AverageConfig, ConstantAverageConfig
from sixfold.engine.build import build_engine
from sixfold.engine.config import AdamWConfig, ConstantScheduleConfig, DDPConfig, EngineConfig
from sixfold.engine.contract import Engine, StepReport
from toy_network import ToyConfig, toy_batch

GLOBAL_BATCH = 16
AVERAGE = ConstantAverageConfig(decay=0.9)
REFERENCE = DDPConfig(precision="fp32")


def this_world() -> World:
    """The pool's rank, or a process alone."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return World(rank=rank, size=size, local_rank=rank)


@dataclass(frozen=True)
class Trace(Trajectory):
    """A trajectory with which steps were skipped and the full final parameters, raw and averaged."""

    skipped: list[bool]
    parameters: dict[str, Tensor]
    averages: dict[str, Tensor]


def toy_engine(
    config: EngineConfig,
    optimizer: Any = None,
    schedule: Any = None,
    average: AverageConfig | None = AVERAGE,
    **toy: Any,
) -> Engine:
    """Build the toy role on the present world."""
    return build_engine(
        config,
        optimizer or AdamWConfig(lr=1e-2, weight_decay=0.1),
        schedule or ConstantScheduleConfig(warmup_steps=3),
        network_config=ToyConfig(**toy),
        role="toy",
        seed=5,
        total_steps=40,
        average=average,
        world=this_world(),
    )


def toy_step(engine: Engine, step: int, accumulation: int = 1, *, poison: float = 1.0) -> tuple[float, StepReport]:
    """Take one step on this rank's slice of the step's global batch; return the global mean loss and the report.

    Counts differ between ranks and micro-batches. ``poison`` multiplies the last rank's first loss.
    """
    world = this_world()
    tokens, targets, weights = toy_batch(step, GLOBAL_BATCH, 7)
    local = GLOBAL_BATCH // world.size
    size = local // accumulation
    total = torch.zeros((), dtype=torch.float64)
    for index in range(accumulation):
        start = world.rank * local + index * size
        part = slice(start, start + size)
        with engine.accumulate(last=index == accumulation - 1):
            logits = engine.module(tokens[part]).float()
            loss = (nn.functional.cross_entropy(logits, targets[part], reduction="none") * weights[part]).sum()
            if world.rank == world.size - 1 and index == 0:
                loss = loss * poison
            engine.backward(loss)
        total += loss.detach().double()
    count = weights.sum()
    report = engine.step(count, finite=torch.isfinite(total))
    return (sum_over_ranks({"loss": total})["loss"] / count).item(), report


def train_toy(
    config: EngineConfig,
    accumulation: int = 1,
    steps: int = 20,
    poisons: dict[int, float] | None = None,
    **settings: Any,
) -> Trace:
    """Train from scratch and return what parity compares."""
    engine = toy_engine(config, **settings)
    trace = continue_toy(engine, 0, steps, accumulation, poisons or {})
    engine.close()
    return trace


def train_toy_with(config: EngineConfig, settings: dict[str, Any]) -> Trace:
    """:func:`train_toy` for pools, which pass no keywords."""
    return train_toy(config, **settings)


def continue_toy(engine: Engine, start: int, stop: int, accumulation: int, poisons: dict[int, float]) -> Trace:
    """Train from one step to another."""
    done = [toy_step(engine, step, accumulation, poison=poisons.get(step, 1.0)) for step in range(start, stop)]
    return Trace(
        losses=[loss for loss, _ in done],
        grad_norms=[report.grad_norm for _, report in done],
        skipped=[report.skipped for _, report in done],
        parameters=dict(engine.full_parameters(averaged=False)),
        averages=dict(engine.full_parameters(averaged=True)),
    )


def toy_leg(
    config: EngineConfig,
    source: str | None,
    target: str,
    start: int,
    stop: int,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Trace, dict[str, Tensor]]:
    """One leg of a run that changes engines: load, train on, save; return the trace and the loaded state."""
    engine = toy_engine(config, **settings)
    loaded = {}
    if source is not None:
        template = engine.checkpoint_template()
        dcp.load(template, checkpoint_id=source)
        engine.load_checkpoint_state(template)
        loaded = whole_state(engine)
    trace = continue_toy(engine, start, stop, 1, {})
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    dcp.save(engine.checkpoint_state(), checkpoint_id=target)
    engine.close()
    return trace, loaded


def whole_state(engine: Engine) -> dict[str, Tensor]:
    """The engine's checkpoint state with every shard gathered; a collective."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().cpu().clone()
        for name, value in engine.checkpoint_state().items()
    }


def saved_state(folder: str) -> dict[str, Tensor]:
    """Everything a checkpoint holds, read by one process."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in metadata.items()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """max |a - b| over two dicts of tensors with the same names."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
