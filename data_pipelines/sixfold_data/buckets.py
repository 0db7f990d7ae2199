"""Aspect-ratio buckets: which shape each picture takes, and which bucket each global batch is of.

Let bucket b hold M_b of the M samples that are trained on. Its batches have the *times* (j + 1/2) / M_b, j = 0, 1, ...,
and the global batches of all buckets come in the order of their times, the lower bucket first where two are equal: the
method of Webster and Sainte-Lague, which gives out seats one by one. Hence

* in any M batches from a multiple of M on, bucket b has exactly M_b: all samples are read equally often;
* at any batch, each bucket has had its exact share of those before within a batch or so;
* which bucket batch t is of, and how many of its batches went before, is found among a few candidates around t / M.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

Shape = tuple[int, int]
"""Height and width: pixels of an image, cells of a latent."""


def nearest_buckets(
    height: Int64[np.ndarray, " n"], width: Int64[np.ndarray, " n"], buckets: Sequence[Shape]
) -> Int64[np.ndarray, " n"]:
    """Return the number of the bucket whose aspect ratio is nearest, in proportion, to each picture's.

    Ratios r and s are as near as max(r / s, s / r) is small: two buckets meet at the square root of their ratios'
    product. Division and square root round alike on all processors, so that all nodes agree.
    """
    ratios = np.asarray([wide / high for high, wide in buckets])
    order = np.argsort(ratios, kind="stable")
    meeting = np.sqrt(ratios[order][:-1] * ratios[order][1:])
    number: np.ndarray = order[np.searchsorted(meeting, width / height)]
    return number


class Turn(NamedTuple):
    """The bucket of a global batch, and how many of the bucket's batches went before."""

    bucket: int
    batches_before: int


def turn_at(batch: int, samples: Sequence[int]) -> Turn:
    """Return the bucket of a global batch.

    Args:
        batch: number of the global batch, from 0.
        samples: M_b, the samples of each bucket; a bucket of none has no batch.
    """
    period, buckets = sum(samples), len(samples)
    rounds, rest = divmod(batch, period)
    candidates: list[tuple[Fraction, int, int]] = []
    earlier = 0
    for bucket, share in enumerate(samples):
        # With every time before x, round(M_b x) batches are out in each bucket: M x within half a batch a bucket.
        first = max(0, share * (rest - buckets) // period - 1)
        last = min(share, share * (rest + buckets) // period + 2)
        candidates += ((Fraction(2 * j + 1, 2 * share), bucket, j) for j in range(first, last))
        earlier += first
    _, bucket, before = sorted(candidates)[rest - earlier]
    return Turn(bucket, rounds * samples[bucket] + before)
