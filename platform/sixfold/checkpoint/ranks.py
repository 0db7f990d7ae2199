"""The few messages by which ranks agree on a checkpoint; alone, each of them is the identity."""

from __future__ import annotations

import pickle
import zlib
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from sixfold.checkpoint.config import CheckpointConfig

T = TypeVar("T")


class Ranks:
    """Object messages within one process group (gloo: they carry CPU bytes, also from a background thread).

    Args:
        group: the group, or ``None`` in a single process.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def gather(self, value: T) -> list[T]:
        """Return all ranks' values on rank 0, and an empty list elsewhere."""
        if self._group is None:
            return [value]
        packed: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(_pack(value), packed, group=self._group, group_dst=0)
        return [_unpack(each) for each in packed or []]

    def scatter(self, values: list[T]) -> T:
        """Return this rank's one of rank 0's values; what other ranks pass is ignored."""
        if self._group is None:
            return values[0]
        received: list[Any] = [None]
        dist.scatter_object_list(received, values if self.rank == 0 else None, group=self._group, group_src=0)
        return cast(T, received[0])

    def broadcast(self, value: T) -> T:
        """Return rank 0's value."""
        if self._group is None:
            return value
        values: list[Any] = [value if self.rank == 0 else None]
        dist.broadcast_object_list(values, group=self._group, group_src=0)
        return cast(T, values[0])

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank: one integer, reduced."""
        if self._group is None:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group)
        return bool(value.item())

    def concatenated(self, values: list[T]) -> list[T]:
        """Return all ranks' lists as one, on every rank; made for lists that are nearly always empty (faults)."""
        if not self.any(bool(values)):
            return []
        return self.broadcast([value for part in self.gather(values) for value in part])


def _pack(value: object) -> bytes:
    """Pickle and compress: rank 0 gets a list of shards or file positions from every rank, full of repetition."""
    return zlib.compress(pickle.dumps(value), level=1)


def _unpack(packed: bytes) -> Any:
    return pickle.loads(zlib.decompress(packed))


def new_group(config: CheckpointConfig) -> dist.ProcessGroup | None:
    """Return a gloo group of all ranks for a checkpointer's own use (a collective), or ``None`` without process groups.

    It is never shared: a background save must not interleave its messages with those of training.
    """
    if not dist.is_initialized():
        return None
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timedelta(seconds=config.timeout_s)))
