"""Whose kernels are taken: those of the device that tensors are on, or of one that a plan pretends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Kernels:
    """A class's attribute, since a context variable would keep blocks from being compiled."""

    of_accelerators = False


@contextmanager
def kernels_of(device: torch.device) -> Iterator[None]:
    """Take the kernels that ``device`` would, whatever device tensors pretend to be on: for plans on fake tensors."""
    before, _Kernels.of_accelerators = _Kernels.of_accelerators, device.type != "cpu"
    try:
        yield
    finally:
        _Kernels.of_accelerators = before


def takes_cpu_kernels(device: torch.device) -> bool:
    """Whether tensors on ``device`` are computed as a CPU does."""
    return device.type == "cpu" and not _Kernels.of_accelerators
