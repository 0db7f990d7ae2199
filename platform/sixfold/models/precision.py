"""Which type matrix products run in."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return autocast's type where it is on, else the type of ``x``.

    A tensor that several products read is cast once by hand: autocast would cast it for each of them.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Context in which autocast is off on the device of ``x``, for what reduced precision would spoil."""
    return torch.autocast(x.device.type, enabled=False)
