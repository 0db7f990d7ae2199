"""Randomness that is owned once: every draw is a pure function of (seed, purpose, global position).

No generator state is carried anywhere. A draw is computed by Philox-4x32-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011) from a key, made of the seed and the purpose, and a counter, made of the global
sample position and the element's index. It therefore does not depend on rank, world size, accumulation, device or
restarts.

The integer core uses only ``* >> & ^`` on 64-bit integers, so one function serves torch tensors and numpy arrays.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

RNG_VERSION = "philox4x32-10/1"
"""Recorded in every checkpoint; changing any draw below requires a new version."""

_MASK = 0xFFFFFFFF
_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)

Integers = TypeVar("Integers", Tensor, np.ndarray)


def derive_key(seed: int, purpose: str) -> tuple[int, int]:
    """Return the two 32-bit key words for ``(seed, purpose)``; independent purposes never share a stream."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox(counter: Sequence[Integers], key: tuple[int, int]) -> tuple[Integers, Integers, Integers, Integers]:
    """Philox-4x32-10: four int64 arrays holding 32-bit counter words to four of 32-bit random words.

    A 32x32-bit product overflows the signed 64-bit range but wraps to the right bits, so masking recovers both halves.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _ROUND_MULTIPLIERS[0], c2 * _ROUND_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK, (k1 + _KEY_INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


class PositionRandom:
    """Random draws for a batch of samples, keyed by their global positions.

    Args:
        seed: the recipe's seed.
        positions: global sample positions, shape ``[n]``; draws are made on their device.
    """

    def __init__(self, seed: int, positions: Int64[Tensor, " n"]) -> None:
        self.seed = seed
        self.positions = positions

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Float[Tensor, "n ..."]:
        """Uniform fp32 in the open interval (0, 1), shape ``[n, *shape]``."""
        # 23 bits and a half: the largest value, 1 - 2**-24, is still below 1 in fp32.
        words = self._words(purpose, math.prod(shape)) >> 9
        return ((words + 0.5) * 2.0**-23).to(torch.float32).reshape(len(self.positions), *shape)

    def normal(self, purpose: str, shape: Sequence[int] = ()) -> Float[Tensor, "n ..."]:
        """Standard normal fp32, shape ``[n, *shape]`` (Box-Muller on pairs of uniforms)."""
        size = math.prod(shape)
        pairs = (size + 1) // 2
        words = self._words(purpose, 2 * pairs)
        radius = torch.sqrt(-2.0 * torch.log(_unit_interval(words[:, :pairs])))
        angle = (2.0 * math.pi) * _unit_interval(words[:, pairs:])
        both = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
        return both[:, :size].to(torch.float32).reshape(len(self.positions), *shape)

    def integers(self, purpose: str, high: int, shape: Sequence[int] = ()) -> Int64[Tensor, "n ..."]:
        """Uniform int64 in ``[0, high)``, shape ``[n, *shape]``; ``high`` up to 2**31, bias below high / 2**32."""
        words = self._words(purpose, math.prod(shape))
        return ((words * high) >> 32).reshape(len(self.positions), *shape)

    def _words(self, purpose: str, size: int) -> Int64[Tensor, "n size"]:
        """Return ``size`` 32-bit random words a sample, as int64."""
        position = self.positions[:, None]
        index = torch.arange((size + 3) // 4, device=position.device)[None, :]
        zeros = torch.zeros_like(position * index)
        counter = (zeros + index, zeros, zeros + (position & _MASK), zeros + ((position >> 32) & _MASK))
        return torch.cat(philox(counter, derive_key(self.seed, purpose)), dim=1)[:, :size]


def _unit_interval(words: Int64[Tensor, "n size"]) -> Float[Tensor, "n size"]:
    """Map 32-bit words to float64 in (0, 1): never 0, so that its logarithm is finite, and never 1."""
    return (words.to(torch.float64) + 0.5) * 2.0**-32
