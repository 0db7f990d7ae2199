"""Several sources mixed in exact proportions, with a closed-form cursor for each.

Let the weights be integers w_k with sum W, and cut [0, W) into intervals of those lengths. Sample n of lane c comes
from the source whose interval holds ``((n + start_c) * a) mod W``, with a coprime to W and near W divided by the golden
ratio: a rotation of the circle. Hence

* in any W consecutive samples of a lane, source k occurs exactly w_k times (a is a unit modulo W), evenly spread;
* at any n the lanes stand evenly around the circle, so that every global batch has the proportions within rounding;
* how many samples lane c has taken from source k after n is a whole number of turns and one look-up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

_GOLDEN_RATIO = (1.0 + math.sqrt(5.0)) / 2.0


class Mixture:
    """Which source each sample comes from.

    Args:
        parts: integer weights w_k.
        lanes: number of lanes C.
    """

    def __init__(self, parts: Sequence[int], lanes: int) -> None:
        self.parts = np.asarray(parts, dtype=np.int64)
        self.period = int(self.parts.sum())
        step = _unit_near(self.period / _GOLDEN_RATIO, self.period)
        circle = np.repeat(np.arange(len(parts)), self.parts)
        self._pattern = circle[np.arange(self.period, dtype=np.int64) * step % self.period]
        taken = np.cumsum(self._pattern[:, None] == np.arange(len(parts)), axis=0, dtype=np.int64)
        self._taken = np.concatenate([np.zeros((1, len(parts)), dtype=np.int64), taken])
        spread = np.arange(lanes, dtype=np.int64) * self.period // lanes
        self._lane_start = spread * pow(step, -1, self.period) % self.period

    def source(self, lane: Int64[np.ndarray, " n"], index: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Return the source of the samples at indices of lanes."""
        source: np.ndarray = self._pattern[(index + self._lane_start[lane]) % self.period]
        return source

    def cursor(
        self, source: Int64[np.ndarray, " n"], lane: Int64[np.ndarray, " n"], index: Int64[np.ndarray, " n"]
    ) -> Int64[np.ndarray, " n"]:
        """Return how many samples a lane has taken from a source before an index."""
        start = self._lane_start[lane]
        taken: np.ndarray = self._total(source, start + index) - self._total(source, start)
        return taken

    def _total(self, source: np.ndarray, steps: np.ndarray) -> np.ndarray:
        turns, rest = np.divmod(steps, self.period)
        total: np.ndarray = turns * self.parts[source] + self._taken[rest, source]
        return total


def _unit_near(value: float, modulus: int) -> int:
    """Return the number nearest to ``value`` that is coprime to ``modulus``."""
    nearest = max(1, round(value))
    outwards = itertools.chain.from_iterable((nearest + away, nearest - away) for away in itertools.count())
    return next(number for number in outwards if number > 0 and math.gcd(number, modulus) == 1)
