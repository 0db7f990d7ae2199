"""What becomes of unreadable samples: replaced at the same position, written down, counted against a budget.

Skipping a sample would shift all later ones and leave ranks with different numbers of steps; instead the position gets
another sample of the same source, drawn as a function of (seed, position): every run and restart draws the same.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sixfold.distributed.randomness import derive_key
from sixfold.errors import DataError, Fault
from sixfold_data.config import CorruptConfig
from sixfold_data.order import random_words

logger = logging.getLogger(__name__)

MAX_REPLACEMENTS = 16
"""Draws at one position before the data set is given up as a whole."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One unreadable sample and what took its place.

    Attributes:
        position: global position in the order of consumption.
        shard: the shard that holds it, with its store.
        key: its key in the shard.
        reason: why it could not be read.
        replaced_by: the number of the sample, in its source, that was read instead.
    """

    position: int
    shard: str
    key: str
    reason: str
    replaced_by: int


def draw_replacement(*, seed: int, position: int, attempt: int, samples: int) -> int:
    """Return the number of the sample to try instead, uniform over the source."""
    index = np.asarray([position], dtype=np.int64)
    return int(random_words(index, attempt, derive_key(seed, "replacement"))[0]) * samples >> 32


class Quarantine:
    """The log of unreadable samples and their budget.

    Args:
        config: the budget; it is held against the distinct samples that this rank met.
        samples: number of samples in the training split.
        log: file that gets one JSON object a line, or None. Ranks may share it.
    """

    def __init__(self, config: CorruptConfig, *, samples: int, log: Path | None) -> None:
        self.budget = max(config.max_samples, int(config.max_fraction * samples))
        self._samples = samples
        self._log = log
        self._met: set[tuple[str, str]] = set()

    @property
    def count(self) -> int:
        """How many distinct samples could not be read."""
        return len(self._met)

    def add(self, damage: Damage) -> None:
        """Write down one damage.

        Raises:
            DataError: the budget is exceeded.
        """
        sample = (damage.shard, damage.key)
        if sample in self._met:
            return
        self._met.add(sample)
        logger.warning("%s: sample %s cannot be read and was replaced: %s", *sample, damage.reason)
        if self._log is not None:
            _append_line(self._log, json.dumps(asdict(damage)))
        if self.count > self.budget:
            raise DataError(
                Fault(
                    what=f"sample {damage.key} cannot be read ({damage.reason}); that makes {self.count} unreadable "
                    f"samples of {self._samples}",
                    where=damage.shard,
                    allowed=f"{self.budget}, the larger of data.corrupt.max_samples and data.corrupt.max_fraction",
                    fix="check the data set with `sixfold data verify` and restore its shards"
                    + (f"; all of them are listed in {self._log}" if self._log else "")
                    + "; or raise the budget",
                )
            )


def _append_line(path: Path, line: str) -> None:
    """Append in one write, so that lines of several processes never mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)
