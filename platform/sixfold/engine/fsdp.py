"""FSDP2: parameters, gradients, optimizer state and averages in shards, gathered by block; HSDP on a 2-D mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from sixfold.distributed.mesh import sharding_mesh
from sixfold.distributed.process_group import ensure_group
from sixfold.engine.base import RoleSpecification, TorchEngine, network_on_meta
from sixfold.engine.config import FSDPConfig
from sixfold.engine.optimizers import build_optimizer
from sixfold.engine.sharding import own_part
from sixfold.models.network import Network, ParameterTag, initial_value, reset_buffers


class FSDPEngine(TorchEngine):
    """Every block is one unit of gathering, what stands around the blocks another."""

    def __init__(self, specification: RoleSpecification) -> None:
        config = specification.engine
        assert isinstance(config, FSDPConfig)
        ensure_group(specification.world)
        with unset_fake_temporarily():  # a rehearsal's mesh must read its ranks, and meta tensors need no fakes
            self._mesh = sharding_mesh(specification.world, replicate=config.replicate)
            network, tags = network_on_meta(specification)
            shard(network, self._mesh, config, specification.dtype)
        network.to_empty(device=specification.world.device)
        initialize_shards(network, tags, seed=specification.seed, role=specification.role)
        _fix_gradient_dtypes(network)
        if active_fake_mode() is not None:
            _gather_once(network)
        optimizer = build_optimizer(
            specification.optimizer, dict(network.named_parameters()), tags, dtype=specification.dtype
        )
        super().__init__(specification, network, network, optimizer)

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """Reduce-scatter after every micro-batch, to keep only shards; all-reduce replicas after the last."""
        root = cast(FSDPModule, self.network)
        root.set_requires_all_reduce(last)
        root.set_is_last_backward(last)
        yield

    def _counts_gradients_once(self) -> bool:
        """Replicas of a shard hold equal gradients: the first replica's count."""
        return self._mesh.ndim == 1 or self._mesh.get_local_rank("replicate") == 0

    def _forget_gathered_parameters(self) -> None:
        forget_gathered(self.network)


def forget_gathered(network: nn.Module) -> None:
    """Free gathered copies of parameters: what a forward without a backward left would not see its shards change."""
    for part in network.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _gather_once(network: nn.Module) -> None:
    """Have FSDP make its unsharded parameters: of fake tensors it could not within a forward-mode derivative."""
    for part in network.modules():
        if isinstance(part, FSDPModule):
            part.unshard()
            part.reshard()


def shard(network: Network, mesh: DeviceMesh, config: FSDPConfig, dtype: torch.dtype) -> None:
    """Apply ``fully_shard`` to every block and then to the whole, with gradients summed in fp32."""
    gathered = None if dtype == torch.float32 else dtype
    # Autocast casts inputs; FSDP must not, or fp32 times and positions would be rounded at the door.
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    shards = mesh.size(-1)

    def placement(parameter: nn.Parameter) -> Shard | None:
        return _placement(parameter, shards)

    for block in network.blocks():
        fully_shard(
            block,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=config.reshard_after_forward,
            shard_placement_fn=placement,
        )
    fully_shard(network, mesh=mesh, mp_policy=policy, shard_placement_fn=placement)
    for part in network.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


def _fix_gradient_dtypes(network: nn.Module) -> None:
    """Have FSDP2 note the dtypes of gradients now: at its first forward the role may be frozen by another's phase.

    It notes them once, from parameters that require gradients then; a role noted as frozen could not be trained.
    """
    network._get_fsdp_state()._lazy_init()  # type: ignore[operator]  # there is no public way


def _placement(parameter: nn.Parameter, shards: int) -> Shard | None:
    """Cut rows; but stacks of expert matrices along their rows where the experts do not divide evenly."""
    uneven = parameter.ndim == 3 and parameter.shape[0] % shards != 0
    return Shard(1) if uneven and parameter.shape[1] % shards == 0 else None


@torch.no_grad()
def initialize_shards(network: Network, tags: dict[str, ParameterTag], *, seed: int, role: str) -> None:
    """Write every rank's shard of the same initial values that an unsharded network has; no communication."""
    for name, value in network.named_parameters():
        assert isinstance(value, DTensor)
        full: Tensor = initial_value(tags[name], value.shape, seed=seed, role=role, name=name)
        value.to_local().copy_(own_part(full, value))
    reset_buffers(network)
