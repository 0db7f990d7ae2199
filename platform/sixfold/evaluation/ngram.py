"""An interpolated Kneser-Ney n-gram model: what a language model must beat to have learnt more than counts.

Absolute discounting with continuation counts below the highest order (Kneser and Ney, 1995; the interpolated form of
Chen and Goodman, 1999, section 2.7), ending in the uniform distribution.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray


class _Level(NamedTuple):
    """Counts of the n-grams of one order, sorted by code: the n-gram read as a number in base ``vocabulary``."""

    codes: Int64[ndarray, " grams"]
    counts: Int64[ndarray, " grams"]
    contexts: Int64[ndarray, " contexts"]
    context_totals: Int64[ndarray, " contexts"]
    context_types: Int64[ndarray, " contexts"]
    discount: float


class NGram:
    """p_k(w | h) = max(c(hw) - D, 0) / c(h) + D types(h) / c(h) * p_{k-1}(w | h without its first token)."""

    def __init__(self, tokens: Int64[ndarray, " n"], *, vocabulary: int, order: int = 3) -> None:
        """Count the n-grams of ``tokens``, whose values lie below ``vocabulary``."""
        assert vocabulary**order < 2**63, "codes of n-grams must fit into 64 bits"
        self.vocabulary, self.order = vocabulary, order
        codes, counts = np.unique(_codes(tokens, vocabulary, order), return_counts=True)
        self._levels: list[_Level] = []
        for length in range(order, 0, -1):
            self._levels.insert(0, _level(codes, counts, vocabulary))
            # a lower order counts in how many different contexts a gram continues, not how often it occurs
            codes, counts = np.unique(codes % vocabulary ** (length - 1), return_counts=True)

    def nats(self, tokens: Int64[ndarray, " n"]) -> Float64[ndarray, " n"]:
        """Return each token's negative log-probability given those before it (fewer than ``order`` at the start)."""
        probability = np.full(len(tokens), 1.0 / self.vocabulary)
        for length, level in enumerate(self._levels, start=1):
            codes = _codes(tokens, self.vocabulary, length)
            lower = probability[length - 1 :]
            probability[length - 1 :] = _interpolate(level, codes, codes // self.vocabulary, lower)
        cost: Float64[ndarray, " n"] = -np.log(probability)
        return cost

    def bits_per_byte(self, tokens: Int64[ndarray, " n"], *, bytes_per_token: float = 1.0) -> float:
        """Return the mean cost of ``tokens`` in bits a byte of source."""
        return float(self.nats(tokens).mean()) / math.log(2.0) / bytes_per_token


def _codes(tokens: Int64[ndarray, " n"], vocabulary: int, length: int) -> Int64[ndarray, " grams"]:
    """Return the code of every run of ``length`` tokens."""
    grams = len(tokens) - length + 1
    codes = np.zeros(max(grams, 0), dtype=np.int64)
    for offset in range(length):
        codes = codes * vocabulary + tokens[offset : offset + len(codes)]
    return codes


def _level(codes: Int64[ndarray, " grams"], counts: Int64[ndarray, " grams"], vocabulary: int) -> _Level:
    contexts, first = np.unique(codes // vocabulary, return_index=True)
    totals = np.add.reduceat(counts, first) if len(first) else counts
    types = np.diff(np.append(first, len(codes)))
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    # the estimate of Ney, Essen and Kneser (1994); without grams seen once it is 0, which would rule out the unseen
    discount = once / (once + 2 * twice) if once else 0.1
    return _Level(codes, counts, contexts, totals, types, min(discount, 0.9))


def _interpolate(
    level: _Level,
    codes: Int64[ndarray, " n"],
    contexts: Int64[ndarray, " n"],
    lower: Float64[ndarray, " n"],
) -> Float64[ndarray, " n"]:
    """Return this order's probabilities; a context never seen has nothing to add to the lower order."""
    count = _look_up(level.codes, level.counts, codes)
    total = _look_up(level.contexts, level.context_totals, contexts)
    types = _look_up(level.contexts, level.context_types, contexts)
    kept = np.maximum(count - level.discount, 0.0) + level.discount * types * lower
    return np.where(total > 0, kept / np.maximum(total, 1), lower)


def _look_up(
    keys: Int64[ndarray, " k"], values: Int64[ndarray, " k"], wanted: Int64[ndarray, " n"]
) -> Int64[ndarray, " n"]:
    """Return the value of each wanted key, 0 where it is missing; ``keys`` are sorted."""
    if len(keys) == 0:
        return np.zeros(len(wanted), dtype=np.int64)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
