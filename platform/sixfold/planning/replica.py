"""A rank's network under DDP or ZeRO as far as forward and backward go: whole, every gradient exchanged as it comes.

These engines cannot run on a process group that does not exist. What stays on a rank between steps and what it sends
follow from how they partition (:mod:`sixfold.planning.partition`); what forward and backward hold in between does not
depend on that, and is seen here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sixfold.engine.base import NetworkSpecification, network_on_meta, requiring_no_gradient
from sixfold.engine.config import DDPConfig, MuonConfig, OptimizerConfig
from sixfold.engine.optimizers import Muon
from sixfold.planning.partition import working_dtype


class Replica:
    """The network of one trainable role, on fake tensors, and the part of its update that is more than a pass."""

    def __init__(self, specification: NetworkSpecification, optimizer: OptimizerConfig) -> None:
        with unset_fake_temporarily():  # meta tensors that fake ones can take the place of
            network, tags = network_on_meta(specification)
        network.to_empty(device=specification.world.device)
        dtype = working_dtype(specification.engine, specification.world.device)
        for value in network.parameters():
            value.data = value.data.to(dtype)
            value.register_post_accumulate_grad_hook(_exchange)  # type: ignore[no-untyped-call]  # torch's
        self._muon: Muon | None = None
        if isinstance(optimizer, MuonConfig):
            masters = {
                name: nn.Parameter(torch.empty_like(value, dtype=torch.float32))
                for name, value in network.named_parameters()
                if tags[name].matrix
            }
            for value in masters.values():
                value.grad = torch.empty_like(value)  # it lies in a bucket or partition, whatever happens
            # ZeRO orthogonalises in the type of its partitions.
            computed_in = specification.dtype if isinstance(specification.engine, DDPConfig) else torch.float32
            self._muon = Muon(optimizer, masters, tags, computed_in)
        self.network: nn.Module = network
        self.module: nn.Module = network

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Nothing is postponed."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a sum of losses."""
        torch.autograd.backward(loss)

    def join_backward(self, loss: Tensor) -> Tensor:
        """Return the loss: gradients of any backward pass are exchanged."""
        return loss

    def update(self) -> None:
        """Orthogonalise matrices where Muon does: every rank has them all."""
        if self._muon is not None:
            self._muon.step(1.0)

    @contextmanager
    def untrained(self) -> Iterator[nn.Module]:
        """Yield the network as another role's phase calls it."""
        with requiring_no_gradient(self.network):
            yield self.network


def _exchange(parameter: Tensor) -> None:
    """A gradient is copied into the bucket or partition that has its place, and freed."""
    parameter.grad = None
