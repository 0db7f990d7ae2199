"""One device, or a replica on every rank with gradients summed by DistributedDataParallel, both through accelerate."""

# DistributedDataParallel checks its hook's annotations as types, so they must not be postponed in this module.

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket  # not re-exported where type checkers look
from torch.nn.parallel import DistributedDataParallel

from sixfold.distributed.process_group import World
from sixfold.engine.base import RoleSpecification, TorchEngine, network_on_meta
from sixfold.engine.optimizers import build_optimizer
from sixfold.errors import EnvironmentFault
from sixfold.models.network import initialize


class DDPEngine(TorchEngine):
    """The full network, its gradients and its optimizer state on every rank."""

    def __init__(self, specification: RoleSpecification) -> None:
        network, tags = network_on_meta(specification)
        network.to_empty(device=specification.world.device)
        initialize(network, tags, seed=specification.seed, role=specification.role)
        optimizer = build_optimizer(
            specification.optimizer, dict(network.named_parameters()), tags, dtype=specification.dtype
        )
        super().__init__(specification, network, _prepare(network, specification.world), optimizer)

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """Postpone the all-reduce until the last micro-batch's backward."""
        with self._synchronization(last):
            yield

    def close(self) -> None:
        """Release the network from accelerate's registry too."""
        _accelerator(self.specification.world)._models.clear()
        super().close()

    def _synchronization(self, last: bool) -> AbstractContextManager[Any]:
        if last or not isinstance(self.module, DistributedDataParallel):
            return nullcontext()
        postponed: AbstractContextManager[Any] = _accelerator(self.specification.world).no_sync(self.module)
        return postponed

    def _counts_gradients_once(self) -> bool:
        return self.specification.world.rank == 0


def _accelerator(world: World) -> Any:
    """Return accelerate's front (its state is one a process, whichever role asks)."""
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError as error:
        raise EnvironmentFault.of(
            "engine type ddp needs the package accelerate, which is not installed",
            where="engine.type",
            allowed="fsdp works without it, on one device too",
            fix="pip install 'sixfold[accelerate]', or set engine.type=fsdp",
        ) from error
    # Its mixed precision is one a process, whereas roles choose theirs: the network's own autocast does that.
    # Buffers change only by rules that all ranks apply alike, so broadcasting them at every forward is waste.
    replicas = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    return Accelerator(cpu=world.device.type == "cpu", mixed_precision="no", kwargs_handlers=[replicas])


def _prepare(network: nn.Module, world: World) -> nn.Module:
    """Place the network and wrap it where there are several ranks, so that gradients are summed, not averaged."""
    with warnings.catch_warnings():
        # Newer torch renames broadcast_buffers, older torch knows no other name, and accelerate passes this one on.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        module: nn.Module = _accelerator(world).prepare_model(network)
    if isinstance(module, DistributedDataParallel):
        module.register_comm_hook(None, _sum_bucket)
    return module


def _sum_bucket(_state: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """All-reduce a bucket without the usual division by the world size: counts differ between ranks."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    summed: torch.futures.Future[Tensor] = work.get_future().then(_first_value)
    return summed


def _first_value(future: torch.futures.Future[list[Tensor]]) -> Tensor:
    return future.value()[0]
