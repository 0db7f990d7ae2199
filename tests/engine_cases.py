"""Training the toy network on any engine, here or on a pool's ranks: what parity and state tests are made of."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.distributed.process_group import World
from sixfold.engine.build import build_engine
from sixfold.engine.config import AdamWConfig, ConstantScheduleConfig
from sixfold.engine.contract import Engine
from toy_network import ToyConfig, toy_batch

GLOBAL_BATCH = 16


def this_world() -> World:
    """The pool's rank, or a process alone."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return World(rank=rank, size=size, local_rank=rank)


@dataclass(frozen=True)
class Trace:
    """Global losses, gradient norms and skips by step, and the full final parameters (raw and averaged)."""

    losses: list[float]
    grad_norms: list[float]
    skipped: list[bool]
    parameters: dict[str, Tensor]
    averages: dict[str, Tensor]


def toy_engine(
    config: Any, optimizer: Any = None, schedule: Any = None, ema_decay: float | None = 0.9, **toy: Any
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
        ema_decay=ema_decay,
        world=this_world(),
    )


def toy_step(engine: Engine, step: int, accumulation: int, *, poisoned: bool = False) -> tuple[float, Any]:
    """Take one step on this rank's slice of the step's global batch; return the global mean loss and the report."""
    world = engine.specification.world  # type: ignore[attr-defined]  # every engine of the package has one
    tokens, targets, weights = toy_batch(step, GLOBAL_BATCH, 7)
    local = GLOBAL_BATCH // world.size
    count = weights.sum()
    mine = slice(world.rank * local, (world.rank + 1) * local)
    tokens, targets, weights = tokens[mine], targets[mine], weights[mine]
    total = torch.zeros((), dtype=torch.float64)
    size = local // accumulation
    for index in range(accumulation):
        part = slice(index * size, (index + 1) * size)
        with engine.accumulate(last=index == accumulation - 1):
            logits = engine.module(tokens[part]).float()
            loss = (nn.functional.cross_entropy(logits, targets[part], reduction="none") * weights[part]).sum()
            if poisoned and world.rank == world.size - 1 and index == 0:
                loss = loss * torch.nan
            engine.backward(loss)
        total += loss.detach().double()
    report = engine.step(count, finite=torch.isfinite(total))
    from sixfold.distributed.collectives import sum_over_ranks

    return (sum_over_ranks({"loss": total})["loss"] / count).item(), report


def train_toy(config: Any, accumulation: int, steps: int, poisoned_step: int = -1, **settings: Any) -> Trace:
    """Train from scratch and return what parity compares."""
    engine = toy_engine(config, **settings)
    losses, norms, skipped = [], [], []
    for step in range(steps):
        loss, report = toy_step(engine, step, accumulation, poisoned=step == poisoned_step)
        losses.append(loss)
        norms.append(report.grad_norm)
        skipped.append(report.skipped)
    trace = Trace(
        losses=losses,
        grad_norms=norms,
        skipped=skipped,
        parameters=dict(engine.full_parameters(averaged=False)),
        averages=dict(engine.full_parameters(averaged=True)),
    )
    engine.close()
    return trace


def largest_relative_difference(a: list[float], b: list[float]) -> float:
    """max |a - b| / |b| over two equally long lists."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))
