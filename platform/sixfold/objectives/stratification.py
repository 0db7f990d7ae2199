"""Evenly spread quantiles, so that held-out measures over random times are nearly free of noise."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""2^64 over the golden ratio, as a signed integer: no other step spreads its multiples more evenly."""


def stratified_quantiles(positions: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return fp32 quantiles in (0, 1), a fixed function of each position.

    The fractional parts of position / golden ratio (a Kronecker sequence): any run of n consecutive positions has
    discrepancy O(log n / n), against O(n^-1/2) of random draws. The product wraps modulo 2^64, which is exact.
    """
    words = ((positions * _GOLDEN) >> 32) & 0xFFFFFFFF
    return ((words.to(torch.float64) + 0.5) * 2.0**-32).to(torch.float32).clamp(max=1.0 - 2.0**-24)
