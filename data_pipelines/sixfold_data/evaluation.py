"""Reading a held-out split in stored order, shared evenly among ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from sixfold.errors import DataError
from sixfold.objectives.contract import Batch
from sixfold_data.config import DataConfig
from sixfold_data.describe import check_alike, combined_fingerprint
from sixfold_data.order import Places
from sixfold_data.quarantine import Quarantine
from sixfold_data.reading import read_fields, scatter
from sixfold_data.sources import open_source


class EvaluationReader:
    """Batches of a split in stored order, the sources of a mixture one after the other; iterate as often as needed.

    Global batch b starts at position ``b * batch * world_size``; a rank takes ``batch`` samples of it in a row. Every
    rank yields the same number of batches; the last may be short or empty.

    Args:
        config: the ``data`` section.
        split: name of the split; None reads ``splits.evaluation``.
        batch: samples of one rank's batch.
        rank, world_size: this rank's share.
        limit: read only the first so many samples, over all ranks.
        quarantine_path: file that lists unreadable samples, shared with the training stream; or None.

    Raises:
        DataError: the data set is malformed or lacks the split, or holds too many unreadable samples.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        split: str | None = None,
        batch: int,
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
        quarantine_path: Path | None = None,
    ) -> None:
        name = config.splits.evaluation if split is None else split
        self._sources = [open_source(config, path, name, seed=None) for path in config.paths]
        manifests = [source.manifest for source in self._sources]
        check_alike(manifests, config.paths)
        self._start = np.cumsum([0, *(len(source.order) for source in self._sources)])
        available = int(self._start[-1])
        if not available:
            raise DataError.of(
                f"split {name!r} is empty, or shorter than one sequence",
                where=", ".join(config.paths),
                fix="build the data set with a larger share of that split, or shorten data.sequence_length",
            )
        self.samples = available if limit is None else min(limit, available)
        self._quarantine = Quarantine(
            config.corrupt,
            fingerprint=combined_fingerprint(manifests),
            split=name,
            samples=available,
            log=quarantine_path,
        )
        self._batch, self._rank, self._world_size = batch, rank, world_size

    def __len__(self) -> int:
        """Return the number of batches of every rank."""
        return math.ceil(self.samples / (self._batch * self._world_size))

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            first = (number * self._world_size + self._rank) * self._batch
            yield self._read(np.arange(min(first, self.samples), min(first + self._batch, self.samples)))

    def first(self) -> Batch:
        """Return the split's first sample, as a batch."""
        return self._read(np.arange(1))

    def _read(self, positions: np.ndarray) -> Batch:
        parts: list[tuple[np.ndarray, dict[str, torch.Tensor]]] = []
        for source, start, end in zip(self._sources, self._start[:-1], self._start[1:], strict=True):
            slots = np.flatnonzero((positions >= start) & (positions < end))
            if len(slots) or (not parts and not len(positions)):
                sample = positions[slots] - start
                fields, damages = read_fields(source, Places(np.zeros_like(sample), sample), positions[slots], seed=0)
                parts.append((slots, fields))
                for damage in damages:
                    self._quarantine.add(damage)
        return Batch(scatter(parts, len(positions)), torch.from_numpy(positions))


def read_split_arrays(config: DataConfig, split: str, *, quarantine_path: Path | None = None) -> dict[str, np.ndarray]:
    """Read a whole (small) split into arrays: the fields of a batch with all samples, in stored order."""
    batches = list(EvaluationReader(config, split=split, batch=256, quarantine_path=quarantine_path))
    return {name: torch.cat([batch[name] for batch in batches]).numpy() for name in batches[0].fields}
