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
from typing import Any

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
    """The log of unreadable samples and their budget, both those of the whole job.

    What counts is what the log says: every rank writes into it and reads what the others wrote, and a restart finds
    there what earlier attempts met. Without a log, the samples that this rank has met since it was made.

    Args:
        config: the budget; it is held against distinct samples of one split.
        fingerprint: of the data set that holds the split.
        split: name of the split.
        samples: number of samples in the split.
        log: file that gets one JSON object a line, or None. Ranks, splits and attempts share it.
    """

    def __init__(self, config: CorruptConfig, *, fingerprint: str, split: str, samples: int, log: Path | None) -> None:
        self.budget = max(config.max_samples, int(config.max_fraction * samples))
        self._scope = {"fingerprint": fingerprint, "split": split}
        self._samples = samples
        self._log = log
        self._read_bytes = 0
        self._met: set[tuple[str, str]] = set()

    @property
    def count(self) -> int:
        """How many distinct samples of the split could not be read, by any rank, in this attempt or an earlier one."""
        self._read_log()
        return len(self._met)

    def add(self, damage: Damage) -> None:
        """Write down one damage, unless the log has it.

        Raises:
            DataError: the budget is exceeded; so it is for every damage from then on, lest a restart pass it over.
        """
        sample = (damage.shard, damage.key)
        self._read_log()
        if sample not in self._met:
            self._met.add(sample)
            logger.warning("%s: sample %s cannot be read and was replaced: %s", *sample, damage.reason)
            if self._log is not None:
                _append_line(self._log, json.dumps(self._scope | asdict(damage)))
        # Counted after writing: of ranks that write at the same time, the last one sees the lines of all.
        if self.count > self.budget:
            raise DataError(
                Fault(
                    what=f"sample {damage.key} cannot be read ({damage.reason}); with it there are {self.count} "
                    f"unreadable samples of {self._samples} in split {self._scope['split']}",
                    where=damage.shard,
                    allowed=f"{self.budget}, the larger of data.corrupt.max_samples and data.corrupt.max_fraction",
                    fix="check the data set with `sixfold data verify` and restore its shards"
                    + (f"; all of them are listed in {self._log}, to be removed then" if self._log else "")
                    + "; or raise the budget",
                )
            )

    def _read_log(self) -> None:
        """Take over what was written into the log since it was last read."""
        if self._log is None or not self._log.exists():
            return
        with self._log.open("rb") as file:
            file.seek(self._read_bytes)
            lines = file.read().rpartition(b"\n")[0]  # what follows the last line end is still being written
        self._read_bytes += len(lines) + bool(lines)
        for line in lines.splitlines():
            entry = _parse_line(line)
            if entry.items() >= self._scope.items():
                self._met.add((str(entry.get("shard")), str(entry.get("key"))))


def _parse_line(line: bytes) -> dict[str, Any]:
    """Return a line's object; an empty one for a line that a full disk or a crash cut short."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _append_line(path: Path, line: str) -> None:
    """Append in one write, so that lines of several processes never mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)
