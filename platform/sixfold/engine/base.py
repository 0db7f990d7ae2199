"""What engines share: the specification of a role, and the step of those whose gradients are torch tensors.

One step: sum the squared gradient and the non-finite flags over ranks in one all-reduce; divide by the global count and
clip in one multiplication; update; average. A skipped step leaves no trace: parameters, optimizer state, averages and
the update count stay as they are. That one count, of *applied* updates, drives bias correction, the averages' warm-up
and the learning rate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sixfold.config.base import Component
from sixfold.distributed.collectives import sum_over_ranks
from sixfold.distributed.process_group import World
from sixfold.engine.activation_checkpointing import apply_activation_checkpointing
from sixfold.engine.averaging import MovingAverages
from sixfold.engine.averaging_config import AverageConfig
from sixfold.engine.config import EngineConfig, OptimizerConfig, ScheduleConfig
from sixfold.engine.contract import State, StepReport
from sixfold.engine.optimizers import Updater
from sixfold.engine.precision import compute_dtype, compute_in
from sixfold.engine.schedules import learning_rate_factor
from sixfold.engine.sharding import local_tensors
from sixfold.models.network import Network, ParameterTag, parameter_tags


@dataclass(frozen=True, kw_only=True)
class NetworkSpecification:
    """All that decides how the network of a role is built.

    Attributes:
        engine: sharding, precision, activation checkpointing, clipping.
        network: the network's own settings.
        role: name of the role; together with ``seed`` it fixes the initial values.
        seed: the recipe's seed.
        world: this process's rank and device.
    """

    engine: EngineConfig
    network: Component
    role: str
    seed: int
    world: World

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return compute_dtype(self.engine.precision, self.world.device)


@dataclass(frozen=True, kw_only=True)
class RoleSpecification(NetworkSpecification):
    """All that decides how one trainable role is built and trained.

    Attributes:
        optimizer: the update rule.
        schedule: factor on its peak rates.
        total_steps: updates at which the schedule ends.
        average: which moving averages of the parameters are kept, or None for none.
    """

    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    total_steps: int
    average: AverageConfig | None


def network_on_meta(specification: NetworkSpecification) -> tuple[Network, dict[str, ParameterTag]]:
    """Build the network without memory, read its tags, and prepare its blocks."""
    with torch.device("meta"):
        network: Network = specification.network.load()(specification.network)
    tags = parameter_tags(network)
    prepare_blocks(network, specification)
    return network, tags


def prepare_blocks(network: Network, specification: NetworkSpecification) -> None:
    """Replace forwards: recomputation inside compilation inside autocast, all inside the hooks of sharding."""
    config = specification.engine
    apply_activation_checkpointing(network, config)
    if config.compile:
        for block in network.blocks():
            block.forward = torch.compile(block.forward, fullgraph=True)  # hooks stay eager
    compute_in(network, specification.dtype, specification.world.device.type)


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that belong into a checkpoint, by fully qualified name."""
    return {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, part in module.named_modules()
        for name, value in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set
    }


@contextmanager
def requiring_no_gradient(network: nn.Module) -> Iterator[None]:
    """Let no gradient reach the network's parameters for a while; those to its inputs pass."""
    parameters = [value for value in network.parameters() if value.requires_grad]
    for value in parameters:
        value.requires_grad_(False)
    try:
        yield
    finally:
        for value in parameters:
            value.requires_grad_(True)


def clip_factor(norm: float, limit: float | None) -> float:
    """Return limit / (norm + 1e-6) where the norm exceeds the limit, else 1: the same expression on every engine."""
    return limit / (norm + 1e-6) if limit is not None and norm > limit else 1.0


class TorchEngine(ABC):
    """An engine whose parameters carry ``grad`` as tensors or DTensors; subclasses shard, reduce and synchronise.

    Args:
        specification: the role.
        network: the bare network, materialised, initialised and sharded.
        module: the network as objectives call it.
        optimizer: over the network's parameters.
    """

    def __init__(
        self, specification: RoleSpecification, network: Network, module: nn.Module, optimizer: Updater
    ) -> None:
        self.specification = specification
        self.network: nn.Module = network
        self.module = module
        self.updates = 0
        self._parameters: Mapping[str, nn.Parameter] = dict(network.named_parameters())
        self._optimizer = optimizer
        average = specification.average
        self._averages = None if average is None else MovingAverages(average, self._parameters)

    @abstractmethod
    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Context of one micro-batch's forward and backward."""

    @abstractmethod
    def _counts_gradients_once(self) -> bool:
        """Whether the norm counts this rank's gradient shards (of ranks that hold equal ones, one is counted)."""

    def _forget_gathered_parameters(self) -> None:  # noqa: B027  # only sharding engines have anything to forget
        """Free copies of parameters that would not see a change of their shards."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a local sum of losses."""
        torch.autograd.backward(loss)

    def join_backward(self, loss: Tensor) -> Tensor:
        """Return the loss: hooks of parameters see any backward pass."""
        return loss

    def step(self, count: Tensor, *, finite: Tensor) -> StepReport:
        """Update from the accumulated gradient; see the module's docstring and the contract."""
        factor = self._learning_rate_factor()
        terms = float(count.item())
        assert terms > 0, "a step needs at least one term over all ranks"
        grad_norm, all_finite = self._agree(finite, terms)
        if all_finite:
            self.apply_update(clip_factor(grad_norm, self.specification.engine.clip_grad_norm) / terms, factor)
        self._zero_gradients()
        rate = factor * self.specification.optimizer.lr
        return StepReport(grad_norm=grad_norm, learning_rate=rate, skipped=not all_finite)

    def apply_update(self, gradient_factor: float, learning_rate_factor: float) -> None:
        """Scale the accumulated gradient, update the parameters and their average."""
        torch._foreach_mul_(local_tensors(self._gradients()), gradient_factor)
        self._optimizer.step(learning_rate_factor)
        self.updates += 1
        if self._averages is not None:
            self._averages.update(self.updates, self._parameters)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Hold the main average in the network, and its own parameters in the average, for a while."""
        if self._averages is None:
            yield
            return
        self._averages.swap(self._parameters)
        self._forget_gathered_parameters()
        try:
            yield
        finally:
            self._averages.swap(self._parameters)
            self._forget_gathered_parameters()

    @contextmanager
    def untrained(self) -> Iterator[nn.Module]:
        """Yield the network as another role's phase calls it: without its wrapper, nothing is reduced."""
        # What is gathered within must not outlive it: a forward without backward leaves parts gathered, and as frozen.
        self._forget_gathered_parameters()
        try:
            with requiring_no_gradient(self.network):
                yield self.network
        finally:
            self._forget_gathered_parameters()

    @torch.no_grad()
    def average_into(self, values: Mapping[str, Tensor], decay: float) -> None:
        """Average the present parameters into ``values``, which are sharded as they are."""
        followers = local_tensors([values[name] for name in self._parameters])
        torch._foreach_lerp_(followers, local_tensors(list(self._parameters.values())), 1.0 - decay)

    def checkpoint_state(self) -> State:
        """Return the live state; sharded parameters, slots and averages as DTensors."""
        state: State = {f"parameters/{name}": value.detach() for name, value in self._parameters.items()}
        for name, slots in self._optimizer.slots().items():
            state |= {f"optimizer/{name}/{slot}": value for slot, value in slots.items()}
        return state | self.average_state()

    def average_state(self) -> State:
        """Return the live averages alone, with the buffers and the number of updates that belong to them."""
        state: State = {} if self._averages is None else self._averages.state()
        state |= {f"buffers/{name}": value for name, value in persistent_buffers(self.network).items()}
        return state | {"optimizer_step": torch.tensor(self.updates)}

    def checkpoint_template(self) -> State:
        """Return empty tensors like :meth:`checkpoint_state`, so that a failed load leaves the engine as it is."""
        return {name: torch.empty_like(value) for name, value in self.checkpoint_state().items()}

    @torch.no_grad()
    def load_checkpoint_state(self, state: State) -> None:
        """Copy a filled template into parameters, buffers, optimizer and averages."""
        live = self.checkpoint_state()
        assert live.keys() == state.keys(), f"state names differ: {sorted(live.keys() ^ state.keys())[:5]}"
        self._forget_gathered_parameters()
        for name, value in live.items():
            if name != "optimizer_step":
                value.copy_(state[name])
        self.updates = int(state["optimizer_step"].item())
        self._optimizer.set_updates(self.updates)

    def full_parameters(self, *, averaged: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield every full parameter (or its average) and persistent buffer on the CPU; a collective."""
        source: Mapping[str, Tensor] = self._parameters
        if averaged and self._averages is not None:
            source = self._averages.main
        for name, value in source.items():
            whole = value.detach()
            yield name, (whole.full_tensor() if isinstance(whole, DTensor) else whole).cpu().clone()
        for name, value in persistent_buffers(self.network).items():
            yield name, value.detach().cpu().clone()

    def close(self) -> None:
        """Drop everything that holds tensors or hooks; the engine is unusable afterwards."""
        self._zero_gradients()
        for owned in ("network", "module", "_parameters", "_optimizer", "_averages"):
            delattr(self, owned)

    def _learning_rate_factor(self) -> float:
        return learning_rate_factor(self.specification.schedule, self.updates, self.specification.total_steps)

    def _gradients(self) -> list[Tensor]:
        return [value.grad for value in self._parameters.values() if value.grad is not None]

    def _zero_gradients(self) -> None:
        for value in self._parameters.values():
            value.grad = None

    def _agree(self, finite: Tensor, terms: float) -> tuple[float, bool]:
        """Return the global norm of the mean gradient and whether all ranks' losses and gradients are finite.

        Norm and flag travel in one all-reduce, and reach the host in one copy.
        """
        norms = torch._foreach_norm(local_tensors(self._gradients()))
        square_sum = torch.stack(norms).double().square().sum() if norms else finite.new_zeros((), dtype=torch.float64)
        if not self._counts_gradients_once():
            square_sum = torch.zeros_like(square_sum)
        agreed = sum_over_ranks({"square_sum": square_sum, "non_finite": (~finite.to(square_sum.device)).double()})
        total, non_finite = torch.stack([agreed["square_sum"], agreed["non_finite"]]).tolist()
        return math.sqrt(total) / terms if total >= 0 else math.nan, non_finite == 0 and math.isfinite(total)
