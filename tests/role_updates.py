"""Who is really updated, and who holds gradients meanwhile: seen around every update of a real training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recipe_cases import advance, close, recipe_on, with_engine
from role_cases import weights
from sixfold.config.base import Component
from sixfold.distributed.process_group import join
from sixfold.engine.contract import Engine
from sixfold.engine.deepspeed import DeepSpeedEngine
from sixfold.train.assembly import assemble
from sixfold.train.loop import Training


@dataclass(frozen=True, kw_only=True)
class Update:
    """One update of one role.

    Attributes:
        step: of the loop.
        role: whose engine stepped.
        changed: by role, how many of its tensors then differed; empty on several ranks, where gathering costs too much.
        with_gradients: roles any of whose parameters held a gradient as the update began.
    """

    step: int
    role: str
    changed: dict[str, int]
    with_gradients: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What a few steps did; all of it can be sent from a rank.

    Attributes:
        updates: in order.
        tensors: by role, how many tensors it has.
        saved: names that a checkpoint would hold, by role.
        moved: parameters of the trained roles at the end less those at the beginning, whole, in one piece by role.
    """

    updates: list[Update]
    tensors: dict[str, int]
    saved: dict[str, list[str]]
    moved: dict[str, Tensor]


def watch(config: Component, name: str, data: str, steps: int, *overrides: str) -> Watched:
    """Train a recipe for some steps through the real loop and watch every update; a collective."""
    world = join()
    recipe = recipe_on(name, data, *overrides)
    training = assemble(with_engine(recipe, config, None), world)
    parts = {**training.engines, **training.companions}
    updates: list[Update] = []
    first = {role: weights(engine) for role, engine in training.engines.items()}
    for role in training.engines:
        _observe(training, role, updates)
    for _ in range(steps):
        advance(training)
    found = Watched(
        updates=updates,
        tensors={role: len(weights(part)) for role, part in parts.items()},
        saved={role: sorted(part.checkpoint_state()) for role, part in training.saved.items()},
        moved={role: _difference(weights(engine), first[role]) for role, engine in training.engines.items()},
    )
    close(training)
    return found


def _difference(after: dict[str, Tensor], before: dict[str, Tensor]) -> Tensor:
    return torch.cat([(value - before[name]).flatten() for name, value in after.items()])


def _observe(training: Training, role: str, updates: list[Update]) -> None:
    """Let the engine of a role step as it does, and note what is so before and after."""
    engine, parts = training.engines[role], {**training.engines, **training.companions}
    step = engine.step

    def observed(count: Tensor, *, finite: Tensor) -> object:
        holders = tuple(name for name, part in parts.items() if _holds_gradients(part))
        before = {name: weights(part) for name, part in parts.items()} if training.ranks == 1 else {}
        report = step(count, finite=finite)
        after = {name: weights(parts[name]) for name in before}
        changed = {
            name: sum(not torch.equal(value, after[name][key]) for key, value in held.items())
            for name, held in before.items()
        }
        updates.append(Update(step=training.progress.step, role=role, changed=changed, with_gradients=holders))
        return report

    engine.step = observed  # type: ignore[method-assign,assignment]  # for as long as it is watched


def _holds_gradients(part: Engine | object) -> bool:
    """Whether any parameter has a gradient, or DeepSpeed has one of it aside."""
    if isinstance(part, DeepSpeedEngine) and any(part._zero.averaged_gradients.values()):
        return True
    return any(value.grad is not None for value in part.network.parameters())  # type: ignore[attr-defined]
