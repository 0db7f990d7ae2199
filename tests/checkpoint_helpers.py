"""A run in miniature: a state whose every value follows from the step, so that any mixture of two checkpoints shows."""

from __future__ import annotations

from pathlib import Path

import torch

from sixfold.checkpoint.checkpointer import Checkpointer
from sixfold.checkpoint.config import CheckpointConfig

SHAPES = {
    "parameters/body.weight": (37, 11),
    "parameters/body.bias": (37,),
    "buffers/scale": (3,),
    "optimizer/body.weight/exp_avg": (37, 11),
    "ema/body.weight": (37, 11),
    "ema/body.bias": (37,),
}


def state_of(step: int, role: str = "denoiser") -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    state = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {role: {**state, "optimizer_step": torch.tensor(step)}}


def empty_state(role: str = "denoiser") -> dict[str, dict[str, torch.Tensor]]:
    state = {name: torch.full(shape, float("nan")) for name, shape in SHAPES.items()}
    return {role: {**state, "optimizer_step": torch.tensor(-1)}}


def extra_of(step: int) -> dict[str, object]:
    return {"progress": {"step": step, "samples": step * 128}, "data": {"epoch": 0, "lanes": [1, 2, step]}}


def open_checkpointer(directory: Path | str, *, group=None, rank=0, world_size=1, **settings) -> Checkpointer:
    identity = {name: settings.pop(name) for name in ("recipe_hash", "fingerprint", "settings") if name in settings}
    identity = {"recipe_hash": "recipe-1", "fingerprint": "data-1", **identity}
    config = CheckpointConfig(**settings)
    return Checkpointer(directory, config, group=group, rank=rank, world_size=world_size, **identity)


def write_steps(directory: Path | str, *steps: int, **settings) -> None:
    checkpointer = open_checkpointer(directory, **settings)
    for step in steps:
        checkpointer.save(step, state_of(step), extra_of(step))
    checkpointer.close()


def equal(left, right) -> bool:
    flat = lambda states: {(role, name): value for role, state in states.items() for name, value in state.items()}  # noqa: E731  # a local shorthand
    a, b = flat(left), flat(right)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
