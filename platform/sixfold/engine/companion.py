"""Networks that no optimizer trains: frozen ones, and those that track another role by a moving average.

They are sharded like the role they serve: cut where that role's parameters are cut (FSDP2, ZeRO-3), else whole on
every rank. ZeRO-3's own partitions belong to its optimizer, so FSDP2 cuts its companions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor

from sixfold.distributed.mesh import sharding_mesh
from sixfold.distributed.process_group import ensure_group
from sixfold.engine.base import NetworkSpecification, network_on_meta, persistent_buffers
from sixfold.engine.config import DeepSpeedConfig, EngineConfig, FSDPConfig
from sixfold.engine.contract import Engine, State
from sixfold.engine.fsdp import forget_gathered, initialize_shards, shard
from sixfold.engine.precision import compute_dtype
from sixfold.engine.sharding import own_part
from sixfold.models.network import initialize
from sixfold.models.settings import NetworkSettings

_PARAMETER_SHARDING_STAGE = 3


class Companion:
    """A frozen or tracking role.

    Args:
        specification: how its network is built; ``role`` is the one whose initial values it has.
        follows: the engine of the role that it tracks, or None for a frozen network.
        decay: of the average, for a tracking one.
    """

    def __init__(
        self, specification: NetworkSpecification, *, follows: Engine | None = None, decay: float | None = None
    ) -> None:
        self.network: nn.Module = _build(specification)
        self.network.requires_grad_(False).eval()
        self._parameters: dict[str, Tensor] = dict(self.network.named_parameters())
        self._decay = decay
        self._follows = follows
        if follows is not None:
            self.update(decay=0.0)

    @property
    def is_saved(self) -> bool:
        """Whether checkpoints hold it; a frozen network is read again from where it came."""
        return self._follows is not None

    def update(self, decay: float | None = None) -> None:
        """Average the followed role's present parameters in; a collective."""
        assert self._follows is not None, "a frozen network follows nobody"
        rate = self._decay if decay is None else decay
        assert rate is not None, "a tracking role has a decay"
        forget_gathered(self.network)
        self._follows.average_into(self._parameters, rate)
        followed = persistent_buffers(self._follows.network)
        for name, value in persistent_buffers(self.network).items():
            value.copy_(followed[name])

    @torch.no_grad()
    def load_full(self, values: Mapping[str, Tensor]) -> None:
        """Take over full parameters and buffers; every rank keeps its part."""
        forget_gathered(self.network)
        for name, value in {**self._parameters, **persistent_buffers(self.network)}.items():
            place(values[name], value)

    def checkpoint_state(self) -> State:
        """Return the live state, under the names an engine would use."""
        state: State = {f"parameters/{name}": value.detach() for name, value in self._parameters.items()}
        return state | {f"buffers/{name}": value for name, value in persistent_buffers(self.network).items()}

    def checkpoint_template(self) -> State:
        """Return empty tensors like :meth:`checkpoint_state`."""
        return {name: torch.empty_like(value) for name, value in self.checkpoint_state().items()}

    @torch.no_grad()
    def load_checkpoint_state(self, state: State) -> None:
        """Copy a filled template."""
        forget_gathered(self.network)
        for name, value in self.checkpoint_state().items():
            value.copy_(state[name])

    def close(self) -> None:
        """Drop everything that holds tensors or hooks."""
        for owned in ("network", "_parameters", "_follows"):
            delattr(self, owned)


def place(whole: Tensor, held: Tensor) -> None:
    """Copy what this rank holds of a whole tensor into its place."""
    if isinstance(held, DTensor):
        held.to_local().copy_(own_part(whole, held))
    else:
        held.copy_(whole)


def _build(specification: NetworkSpecification) -> nn.Module:
    settings, device = specification.network, specification.world.device
    if isinstance(settings, NetworkSettings) and settings.pretrained:
        whole: nn.Module = settings.load()(settings)
        return whole.to(device)
    sharding = _sharding(specification.engine)
    if sharding is None:
        with unset_fake_temporarily():  # as below
            network, tags = network_on_meta(specification)
        network.to_empty(device=device)
        initialize(network, tags, seed=specification.seed, role=specification.role)
        return network
    ensure_group(specification.world)
    with unset_fake_temporarily():  # as when an engine is rehearsed
        mesh = sharding_mesh(specification.world, replicate=sharding.replicate)
        network, tags = network_on_meta(specification)
        shard(network, mesh, sharding, compute_dtype(sharding.precision, device))
    network.to_empty(device=device)
    initialize_shards(network, tags, seed=specification.seed, role=specification.role)
    return network


def _sharding(config: EngineConfig) -> FSDPConfig | None:
    """How a companion of a role on this engine is cut; None keeps it whole."""
    if isinstance(config, FSDPConfig):
        return config
    if isinstance(config, DeepSpeedConfig) and config.zero_stage == _PARAMETER_SHARDING_STAGE:
        return FSDPConfig(precision=config.precision)
    return None
