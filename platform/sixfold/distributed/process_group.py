"""Joining and leaving the job: which rank this process is, on which device, and its process groups.

A process that is alone needs no process group; engines that do (FSDP2, DeepSpeed) ask for one of size 1 by
:func:`ensure_group`. Checkpoints and
agreement use a gloo group of their own, so that they cannot interleave with training.
"""

from __future__ import annotations

import atexit
import gc
import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore  # not re-exported where type checkers look
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sixfold.errors import EnvironmentFault

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place in the job.

    Attributes:
        rank: number of this process, 0 to ``size - 1``.
        size: how many processes train together.
        local_rank: number of this process on its machine; picks the CUDA device.
        device: where this rank's tensors live.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


_agreement_group: dist.ProcessGroup | None = None
_meshes: dict[tuple[str, tuple[int, ...], tuple[str, ...]], DeviceMesh] = {}


def join(*, device_type: str | None = None, timeout_s: float = 1800.0) -> World:
    """Join the job that RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and LOCAL_RANK describe; without them, stand alone.

    Args:
        device_type: ``cpu`` or ``cuda``; by default CUDA where there is one.
        timeout_s: how long a collective may wait for a rank before it fails.

    Raises:
        EnvironmentFault: some of the variables are missing or no number, or the rendezvous fails.
    """
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    rank, size, local_rank = _place_from_environment()
    device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        try:
            dist.init_process_group(_backend(device_type), timeout=timedelta(seconds=timeout_s))
        except (RuntimeError, ValueError) as error:
            raise EnvironmentFault.of(
                f"the {size} ranks could not find each other: {error}",
                where=f"rank {rank}, MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}",
                fix="check that all ranks started, that the address is reachable from every node and the port is free",
            ) from error
    return World(rank=rank, size=size, local_rank=local_rank, device=device)


def ensure_group(world: World) -> None:
    """Make a process group of size 1 for an engine that cannot do without one."""
    if not dist.is_initialized():
        assert world.size == 1, "several ranks join their group before they build engines"
        dist.init_process_group(_backend(world.device.type), store=HashStore(), rank=0, world_size=1)
        atexit.register(leave)


def agreement_group() -> dist.ProcessGroup | None:
    """Return the gloo group for checkpoints and agreement, None if alone; all ranks join in the first call."""
    global _agreement_group  # noqa: PLW0603  # one a process, like the default group it stands beside
    if _agreement_group is None and dist.is_initialized() and dist.get_world_size() > 1:
        _agreement_group = dist.new_group(backend="gloo")
    return _agreement_group


def mesh_of(device_type: str, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """Arrange all ranks as a mesh; a collective where this arrangement is new.

    Equal arrangements are one mesh: the engines of all roles share its groups, each of which costs threads and, on
    CUDA, a communicator with buffers of its own.
    """
    key = (device_type, shape, names)
    if key not in _meshes:
        _meshes[key] = init_device_mesh(device_type, shape, mesh_dim_names=names)
    return _meshes[key]


def leave() -> None:
    """Leave the job after everything that communicates was closed and released by its owners.

    Gloo's threads may outlive the interpreter's tensors and abort the process (exit 134): what a wrapped module still
    holds is collected first, then all ranks meet, then the groups end.
    """
    gc.collect()
    if not dist.is_initialized():
        return
    if dist.get_backend() != "fake":
        dist.barrier()
    end_groups()
    gc.collect()


def end_groups() -> None:
    """End the process groups and forget what was made of them."""
    global _agreement_group  # noqa: PLW0603  # see agreement_group
    _agreement_group = None
    _meshes.clear()
    dist.destroy_process_group()


def _backend(device_type: str) -> str:
    """CPU collectives stay possible beside CUDA's: asynchronous checkpoints need them."""
    return "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"


def _place_from_environment() -> tuple[int, int, int]:
    """Read (rank, size, local rank)."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, 0
    size = _integer("WORLD_SIZE")
    if size == 1:
        return 0, 1, 0
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise EnvironmentFault.of(
            f"WORLD_SIZE is {size} but {', '.join(missing)} is not set",
            allowed=", ".join(_VARIABLES) + " together, or none of them",
            fix="start the ranks with `sixfold run --nproc N` or a launcher that sets them all",
        )
    rank = _integer("RANK")
    return rank, size, _integer("LOCAL_RANK") if "LOCAL_RANK" in os.environ else rank


def _integer(name: str) -> int:
    """Read a whole number from the environment."""
    text = os.environ[name]
    if not text.isdigit():
        raise EnvironmentFault.of(
            f"{name} is {text!r}", where="environment", allowed="a whole number", fix=f"set {name} to one, or unset it"
        )
    return int(text)
