"""Device meshes: how ranks are arranged for sharding."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sixfold.distributed.process_group import World, mesh_of
from sixfold.errors import RecipeError


def sharding_mesh(world: World, *, replicate: int) -> DeviceMesh:
    """Arrange all ranks as ``[shard]``, or as ``[replicate, shard]`` with neighbours in one shard group (HSDP).

    Neighbouring ranks share a node, so that the frequent gathers of parameters stay on the fast links.

    Raises:
        RecipeError: ``replicate`` does not divide the world size.
    """
    if world.size % replicate != 0:
        raise RecipeError.of(
            f"engine.replicate is {replicate}, which does not divide {world.size} ranks",
            where="engine.replicate",
            allowed=", ".join(str(n) for n in range(1, world.size + 1) if world.size % n == 0),
            fix="set engine.replicate to the number of nodes, or to 1",
        )
    shape, names = (replicate, world.size // replicate), ("replicate", "shard")
    if replicate == 1:
        return mesh_of(world.device.type, shape[1:], names[1:])
    return mesh_of(world.device.type, shape, names)


def host_mesh() -> DeviceMesh:
    """All ranks in one row on the CPU: how states that live nowhere else as DTensors are cut for checkpoints."""
    return mesh_of("cpu", (dist.get_world_size(),), ("rank",))
