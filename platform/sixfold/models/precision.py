"""Which type matrix products run in."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return autocast's type where it is on, else the type of ``x``.

    A tensor that several products read is cast once by hand: autocast would cast it for each of them.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
