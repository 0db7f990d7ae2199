"""A process group without processes: collectives move nothing, so that one process can rehearse many ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from sixfold.distributed.process_group import World, end_groups


@contextmanager
def fake_world(size: int, *, device_type: str = "cpu") -> Iterator[World]:
    """Be rank 0 of ``size`` ranks that do not exist.

    Only for runs whose numbers nobody reads (fake tensors). No process group may exist yet.
    """
    # Torch ships its fake backend with its testing tools; importing it registers it.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a rehearsal needs a process of its own: this one already belongs to a group"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield World(rank=0, size=size, local_rank=0, device=torch.device(device_type))
    finally:
        end_groups()
