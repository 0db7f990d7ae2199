"""The few collectives outside the engines: sums in one message, agreement, and gathered objects.

All are the identity in a process that stands alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sixfold.distributed.process_group import agreement_group

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether there is anyone to talk to."""
    return dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum tensors of any shape and dtype over all ranks in one all-reduce, in fp64 (exact for counts up to 2**53).

    All ranks name the same values in the same order and shapes; results keep their value's shape and dtype.
    """
    if not is_distributed() or not values:
        return dict(values)
    message = torch.cat([value.detach().reshape(-1).double() for value in values.values()])
    dist.all_reduce(message)
    parts = torch.split(message, [math.prod(value.shape) for value in values.values()])
    return {
        name: part.reshape(value.shape).to(value.dtype)
        for (name, value), part in zip(values.items(), parts, strict=True)
    }


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank: the answer on which all ranks act alike."""
    if not is_distributed():
        return flag
    message = torch.tensor(int(flag))
    dist.all_reduce(message, op=dist.ReduceOp.MAX, group=agreement_group())
    return bool(message.item())


def gather_objects(value: T) -> list[T]:
    """Return every rank's object, by rank, on all ranks. Objects are pickled: only for what this code itself made."""
    if not is_distributed():
        return [value]
    gathered: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, group=agreement_group())
    return gathered  # type: ignore[return-value]  # every slot was filled by its rank


def broadcast_object(value: T | None) -> T:
    """Return rank 0's object on all ranks."""
    if not is_distributed():
        assert value is not None
        return value
    message = [value]
    dist.broadcast_object_list(message, src=0, group=agreement_group())
    result = message[0]
    assert result is not None
    return result


def barrier() -> None:
    """Wait for all ranks, on the CPU."""
    if is_distributed():
        dist.barrier(group=agreement_group())
