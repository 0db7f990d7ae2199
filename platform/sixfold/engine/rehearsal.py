"""A dry run: one training step of a role at full size and world size, on fake tensors, in one process, without memory.

Shapes, dtypes, sharding and the optimizer's update are all exercised; only the numbers are missing. What a rank would
hold is then counted from the shards themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor

from sixfold.config.base import Component
from sixfold.distributed.fake import fake_world
from sixfold.distributed.process_group import World
from sixfold.engine.averaging import MAIN, kinds_of
from sixfold.engine.averaging_config import AverageConfig
from sixfold.engine.base import NetworkSpecification, RoleSpecification, network_on_meta
from sixfold.engine.companion import Companion
from sixfold.engine.config import ConstantScheduleConfig, DeepSpeedConfig, EngineConfig, FSDPConfig, OptimizerConfig
from sixfold.engine.fsdp import FSDPEngine
from sixfold.engine.optimizers import build_optimizer
from sixfold.models.settings import NetworkSettings

Loss = Callable[[nn.Module, Mapping[str, nn.Module], Mapping[str, Tensor]], Tensor]
"""The objective's 0-dimensional sum, from the network in training, the other roles' networks and a batch's fields."""

BatchFields = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""A micro-batch's fields: shape, first dimension the samples, and dtype."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What one role costs.

    Attributes:
        parameters: elements of the whole network.
        world_size: ranks that were rehearsed.
        parameter_bytes: fp32 masters that rank 0 holds; likewise gradients, optimizer state and the moving average.
        gradient_bytes: see above.
        optimizer_bytes: see above.
        average_bytes: see above.
    """

    parameters: int
    world_size: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int

    @property
    def bytes_per_rank(self) -> int:
        """All of the above for rank 0; activations and communication buffers come on top."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.average_bytes


def rehearse(
    network_config: Component,
    engine_config: EngineConfig,
    optimizer_config: OptimizerConfig,
    *,
    batch_fields: BatchFields,
    loss: Loss,
    world_size: int,
    average: AverageConfig | None = None,
    others: Mapping[str, Component] | None = None,
) -> Rehearsal:
    """Run forward, backward and an update of one role as rank 0 of ``world_size``, and count what the rank holds.

    FSDP2 runs as it is, on a fake process group. DDP and DeepSpeed run the network unsharded, which proves its shapes,
    and what their ranks hold is counted from their partitioning.

    Args:
        network_config: the network.
        engine_config: how it is sharded.
        optimizer_config: its update rule.
        batch_fields: one rank's micro-batch.
        loss: the objective, as a function of the wrapped network, the other roles' and the micro-batch's fields.
        world_size: how many ranks to pretend; nothing may have joined a process group yet.
        average: the moving averages that the role keeps, if any.
        others: by role, the settings of networks that the loss calls but that are not trained meanwhile.

    Raises:
        RecipeError: the engine's settings do not fit ``world_size``.
    """
    with fake_world(world_size) as world, FakeTensorMode(allow_non_fake_inputs=True):
        specification = RoleSpecification(
            engine=engine_config.model_copy(update={"compile": False}),  # compiling needs real tensors and minutes
            optimizer=optimizer_config,
            schedule=ConstantScheduleConfig(),
            network=network_config,
            role="rehearsed",
            seed=0,
            total_steps=1,
            average=average,
            world=world,
        )
        batch = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in batch_fields.items()}
        shared = {name: getattr(specification, name) for name in ("engine", "role", "seed", "world")}
        frozen = {
            role: untrained_network(NetworkSpecification(network=settings, **shared))
            for role, settings in (others or {}).items()
        }

        def of_network(network: nn.Module) -> Tensor:
            return loss(network, frozen, batch)

        if isinstance(engine_config, FSDPConfig):
            return _rehearse_sharded(specification, of_network)
        return _rehearse_replicated(specification, of_network)


def rehearse_untrained(network_config: Component, engine_config: EngineConfig, *, world_size: int) -> Rehearsal:
    """Build one role that nothing trains as rank 0 of ``world_size`` has it, and count what the rank holds of it."""
    with fake_world(world_size) as world, FakeTensorMode(allow_non_fake_inputs=True):
        network = untrained_network(
            NetworkSpecification(engine=engine_config, network=network_config, role="rehearsed", seed=0, world=world)
        )
        parameters = list(network.parameters())
        return Rehearsal(
            parameters=sum(math.prod(value.shape) for value in parameters),
            world_size=world_size,
            parameter_bytes=_bytes(parameters),
            gradient_bytes=0,
            optimizer_bytes=0,
            average_bytes=0,
        )


def untrained_network(specification: NetworkSpecification) -> nn.Module:
    """Return a frozen or tracking network on fake tensors; of a pretrained one, what stands in for it.

    Raises:
        RecipeError: nothing tells how large a pretrained network is.
    """
    settings = specification.network
    if isinstance(settings, NetworkSettings) and settings.stand_in is not None:
        module, name = settings.stand_in.split(":")
        silent: nn.Module = getattr(import_module(module), name)(settings)
        return silent.requires_grad_(False)
    return Companion(specification).network


def _rehearse_sharded(
    specification: RoleSpecification,
    loss: Callable[[nn.Module], Tensor],
) -> Rehearsal:
    engine = FSDPEngine(specification)
    with engine.accumulate(last=True):
        engine.backward(loss(engine.module))
    gradients = _bytes(value.grad for value in engine.network.parameters() if value.grad is not None)
    engine.apply_update(1.0, 1.0)
    state = engine.checkpoint_state()
    parameters = {name: value for name, value in state.items() if name.startswith("parameters/")}
    return Rehearsal(
        parameters=sum(math.prod(value.shape) for value in parameters.values()),
        world_size=specification.world.size,
        parameter_bytes=_bytes(parameters.values()),
        gradient_bytes=gradients,
        optimizer_bytes=_bytes(value for name, value in state.items() if name.startswith("optimizer/")),
        average_bytes=_bytes(value for name, value in state.items() if name.startswith(MAIN)),
    )


def _rehearse_replicated(
    specification: RoleSpecification,
    loss: Callable[[nn.Module], Tensor],
) -> Rehearsal:
    with unset_fake_temporarily():  # meta tensors that fake ones can take the place of
        network, tags = network_on_meta(specification)
    network.to_empty(device=specification.world.device)
    torch.autograd.backward(loss(network))
    parameters = dict(network.named_parameters())
    optimizer = build_optimizer(specification.optimizer, parameters, tags, dtype=specification.dtype)
    optimizer.step(1.0)
    whole = _bytes(parameters.values())
    slots = _bytes(value for slots in optimizer.slots().values() for value in slots.values())
    averages = 0 if specification.average is None else len(kinds_of(specification.average))
    parts = _partitions(specification.engine, specification.world)
    return Rehearsal(
        parameters=sum(value.numel() for value in parameters.values()),
        world_size=specification.world.size,
        parameter_bytes=whole // parts["parameters"],
        gradient_bytes=whole // parts["gradients"],
        optimizer_bytes=slots // parts["optimizer"],
        average_bytes=whole * averages // parts["optimizer"],
    )


def _partitions(config: EngineConfig, world: World) -> dict[str, int]:
    """Over how many ranks each part is cut: nothing under DDP, one more part with each ZeRO stage."""
    stage = config.zero_stage if isinstance(config, DeepSpeedConfig) else 0
    cut_from = {"optimizer": 1, "gradients": 2, "parameters": 3}
    return {part: world.size if stage >= first else 1 for part, first in cut_from.items()}


def _bytes(values: Iterable[Tensor]) -> int:
    """Memory of the local tensors."""
    local = [value.to_local() if isinstance(value, DTensor) else value for value in values]
    return sum(value.numel() * value.element_size() for value in local)
