"""What an engine is: one trainable role's network, optimizer, schedule, precision, clipping and EMA, sharded one way.

Engines differ in how they shard and reduce; they agree, within rounding, on every number: the gradient is the sum of
local sums divided once by the global count, the norm is global, the finite check is agreed by all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

State = dict[str, Tensor]
"""A flat state: canonical name to tensor or DTensor.

Names are engine-neutral: ``parameters/<fqn>`` (fp32), ``buffers/<fqn>``, ``optimizer/<fqn>/<slot>``
(``exp_avg``, ``exp_avg_sq``, ``momentum_buffer``; fp32), ``optimizer_step`` (int64, one a role),
``ema/<fqn>`` and, of further averages, ``ema_<width>/<fqn>`` (fp32).
"""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one optimizer step did.

    Attributes:
        grad_norm: global 2-norm of the mean gradient before clipping.
        learning_rate: the rate that was used.
        skipped: whether a non-finite loss or gradient on any rank made all ranks skip the update.
    """

    grad_norm: float
    learning_rate: float
    skipped: bool


class Engine(Protocol):
    """The contract of ``engine/``: one a trainable role."""

    network: nn.Module
    """The bare network (its parameters may be DTensors or empty partitions)."""
    module: nn.Module
    """The network as objectives must call it."""

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Context of one micro-batch's forward and backward; ``last`` lets gradients synchronise."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a local *sum* of losses."""
        ...

    def join_backward(self, loss: Tensor) -> Tensor:
        """Prepare to accumulate in the backward pass of another engine, and return the loss to run it on."""
        ...

    def step(self, count: Tensor, *, finite: Tensor) -> StepReport:
        """Divide by the global ``count`` (already all-reduced), check, clip, update, average (EMA), zero the gradients.

        ``finite`` is this rank's 0-dimensional bool: whether all local losses were finite.
        """
        ...

    def untrained(self) -> AbstractContextManager[nn.Module]:
        """Context in which no gradient reaches the parameters; yields the network as other roles' phases call it."""
        ...

    def average_into(self, values: Mapping[str, Tensor], decay: float) -> None:
        """v <- decay v + (1 - decay) p for every parameter p; a collective.

        ``values`` are a :class:`~sixfold.engine.companion.Companion`'s parameters, made for this engine's settings.
        """
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Context in which the network holds its EMA parameters (its own where the recipe keeps no EMA)."""
        ...

    def checkpoint_state(self) -> State:
        """The state to save: sharded engines return DTensors or only the tensors this rank is to write."""
        ...

    def average_state(self) -> State:
        """The part of :meth:`checkpoint_state` that snapshots hold: averages, buffers, ``optimizer_step``."""
        ...

    def checkpoint_template(self) -> State:
        """Tensors of the shapes and placements to load a saved state into."""
        ...

    def load_checkpoint_state(self, state: State) -> None:
        """Take over a loaded state (the filled template)."""
        ...

    def full_parameters(self, *, averaged: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield every full fp32 parameter and persistent buffer on the CPU, one at a time; all ranks take part."""
        ...

    def close(self) -> None:
        """Release modules, optimizers and hooks, so that the process group can be left cleanly."""
        ...
