"""What a step of several roles holds at its peak, beside what each of its roles needs alone.

A role needs what stays of it (parameters, optimizer state, averages, buffers) and the peak of its own computation when
it runs alone: the largest of the calls that the step makes of it, forward and, where gradients are asked for, backward,
with the gradients of its parameters where it is trained. Bytes of tensors on one process, as the meter counts them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sixfold.distributed.process_group import World
from sixfold.planning.meter import StepMeter
from sixfold.recipe.recipe import Recipe
from sixfold.train.assembly import assemble
from sixfold.train.loop import Training, train_step


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one role needs: bytes that stay of it, and the most that it adds while it computes alone."""

    held_bytes: int
    computing_bytes: int

    @property
    def total_bytes(self) -> int:
        """Both."""
        return self.held_bytes + self.computing_bytes


@dataclass(frozen=True, kw_only=True)
class MemoryOfStep:
    """The peak of a step in which every role takes part, and the needs by role."""

    peak_bytes: int
    needs: Mapping[str, Need]

    @property
    def ratio(self) -> float:
        """The peak over the sum of the needs."""
        return self.peak_bytes / sum(need.total_bytes for need in self.needs.values())


@dataclass(frozen=True)
class _Call:
    """One call of a network as a step made it: which parameters and inputs were to get gradients."""

    network: nn.Module
    inputs: Any
    trained: bool
    with_gradients: bool


def measure_memory(recipe: Recipe) -> MemoryOfStep:
    """Train a recipe on this process until all of its optimizers have their state, and measure a step that trains all.

    Two such steps are taken: one to see how roles are called, one to measure.
    """
    training = assemble(recipe, World())
    _until_all_train(training)  # so that every optimizer has its state
    _step(training)
    _until_all_train(training)
    with _recorded(training) as calls:
        _step(training)
    _until_all_train(training)
    held = {role: _held_bytes(part) for role, part in {**training.engines, **training.companions}.items()}
    batch = next(training.stream)
    with StepMeter() as meter:
        train_step(training, batch)
    peak = meter.readings().peak_bytes
    needs = {
        role: Need(held_bytes=held[role], computing_bytes=max(map(_alone, calls[role]), default=0)) for role in held
    }
    training.close()
    return MemoryOfStep(peak_bytes=sum(held.values()) + peak, needs=needs)


def _until_all_train(training: Training) -> None:
    while {role for phase in training.objective.phases(training.progress) for role in phase.trains} != set(
        training.engines
    ):
        _step(training)


def _step(training: Training) -> None:
    training.progress = train_step(training, next(training.stream)).progress


def _held_bytes(part: Any) -> int:
    return sum(value.numel() * value.element_size() for value in part.checkpoint_state().values())


@contextmanager
def _recorded(training: Training) -> Iterator[dict[str, list[_Call]]]:
    """Record the calls of every role's network for a while."""
    calls: dict[str, list[_Call]] = {role: [] for role in training.networks}
    hooks = []
    for role, network in training.networks.items():

        def record(network: nn.Module, args: Any, kwargs: Any, role: str = role) -> None:
            inputs = tree_map(_copy, (args, kwargs))
            trained = any(value.requires_grad for value in network.parameters())
            calls[role].append(_Call(network, inputs, trained, torch.is_grad_enabled()))

        hooks.append(network.register_forward_pre_hook(record, with_kwargs=True))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _copy(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _alone(call: _Call) -> int:
    """Repeat a call by itself; return the most that it held at once."""
    args, kwargs = call.inputs
    trainable = [value for value in call.network.parameters() if value.requires_grad]
    for value in trainable:
        value.requires_grad_(call.trained)
    with StepMeter() as meter, torch.set_grad_enabled(call.with_gradients):
        outputs = [value for value in tree_leaves(call.network(*args, **kwargs)) if isinstance(value, Tensor)]
        if any(value.requires_grad for value in outputs):
            torch.autograd.backward([value.float().square().sum() for value in outputs])
        del outputs
    for value in trainable:
        value.requires_grad_(True)
        value.grad = None
    return meter.readings().peak_bytes
