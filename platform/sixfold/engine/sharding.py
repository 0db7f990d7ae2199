"""From whole tensors to the part a rank holds, without communication."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def local_tensors(values: Sequence[Tensor]) -> list[Tensor]:
    """Return the plain tensors this rank holds: shards of DTensors, others as they are."""
    return [value.to_local() if isinstance(value, DTensor) else value for value in map(Tensor.detach, values)]


def own_part(whole: Tensor, like: DTensor) -> Tensor:
    """Cut out of a whole tensor what this rank holds of ``like``, as a view.

    Parts are of ceil(size / ranks) elements, the last ones shorter or empty, as in ``torch.chunk``.
    (``distribute_tensor`` cuts every rank's part to keep one, which is slow at hundreds of ranks.)
    """
    mesh = like.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "every rank is in the mesh"
    part = whole
    for axis, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            size = part.shape[placement.dim]
            chunk = -(-size // mesh.size(axis))
            start = min(coordinate[axis] * chunk, size)
            part = part.narrow(placement.dim, start, min(chunk, size - start))
    return part
