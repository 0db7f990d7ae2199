"""In which arithmetic a role computes: fp32 masters always, forward and backward in bf16 where it pays.

Every engine runs the network's forward under autocast, which keeps softmax and norms in fp32; engines that gather
parameters (FSDP2, ZeRO) gather them in bf16 besides, and all reduce gradients in fp32.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn


def compute_dtype(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> torch.dtype:
    """Resolve a recipe's precision on a device: ``auto`` takes bf16 only where the hardware multiplies it faster."""
    if precision == "fp32":
        return torch.float32
    if precision == "bf16" or _multiplies_bfloat16_fast(device):
        return torch.bfloat16
    return torch.float32


def _multiplies_bfloat16_fast(device: torch.device) -> bool:
    """CUDA from Ampere on; CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Torch has no public name for these two capability checks.
    return any(
        check()
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        if (check := getattr(torch.cpu, name, None))
    )


def compute_in(network: nn.Module, dtype: torch.dtype, device_type: str) -> None:
    """Make the network's forward run under autocast to ``dtype`` (unchanged for fp32).

    The instance's ``forward`` is replaced, so that names stay and hooks of sharding engines run around it.
    """
    if dtype == torch.float32:
        return
    inner = network.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_type, dtype=dtype):
            return inner(*args, **kwargs)

    network.forward = forward
