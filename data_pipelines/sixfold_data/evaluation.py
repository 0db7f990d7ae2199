"""Reading a held-out split in stored order, bucket by bucket, shared evenly among ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from sixfold.errors import DataError
from sixfold.objectives.contract import Batch
from sixfold_data.config import DataConfig
from sixfold_data.decode import with_unit_range
from sixfold_data.describe import check_alike, combined_fingerprint
from sixfold_data.order import Places
from sixfold_data.quarantine import Quarantine
from sixfold_data.reading import read_fields, scatter
from sixfold_data.sources import Source, open_sources


class EvaluationReader:
    """Batches of a split in stored order, the sources of a mixture one after the other; iterate as often as needed.

    A global batch is the next ``batch * world_size`` positions; a rank takes ``batch`` samples of it in a row. Every
    rank yields the same number of batches; the last may be short or empty. Buckets are read one after the other, and
    the last batch of each may be so.

    Args:
        config: the ``data`` section.
        split: name of the split; None reads ``splits.evaluation``.
        batch: samples of one rank's batch.
        rank, world_size: this rank's share.
        limit: read only the first so many samples, over all ranks; of each bucket, in proportion.
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
        opened = [open_sources(config, path, name, seed=None) for path in config.paths]
        manifests = [sources[0].manifest for sources in opened]
        check_alike(manifests, config.paths)
        # Sources in one group may share a batch: those of a mixture, but not buckets.
        self._groups = [[sources[0] for sources in opened]] if config.buckets is None else [[s] for s in opened[0]]
        sizes = [sum(len(source.order) for source in group) for group in self._groups]
        available = sum(sizes)
        if not available:
            raise DataError.of(
                f"split {name!r} is empty, or shorter than one sequence",
                where=", ".join(config.paths),
                fix="build the data set with a larger share of that split, or shorten data.sequence_length",
            )
        self.samples = available if limit is None else min(limit, available)
        self._group_start = [end * self.samples // available for end in itertools.accumulate([0, *sizes])]
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
        together = self._batch * self._world_size
        return sum(math.ceil((end - start) / together) for _, start, end in self._runs())

    def __iter__(self) -> Iterator[Batch]:
        for group, start, end in self._runs():
            for together in range(start, end, self._batch * self._world_size):
                first = together + self._rank * self._batch
                yield self._read(group, start, np.arange(min(first, end), min(first + self._batch, end)))

    def first(self) -> Batch:
        """Return the split's first sample, as a batch."""
        group, start, _ = next(run for run in self._runs() if run[1] < run[2])
        return self._read(group, start, np.arange(1))

    def _runs(self) -> Iterator[tuple[Sequence[Source], int, int]]:
        """Yield each group of sources with its first position and its end."""
        yield from zip(self._groups, self._group_start[:-1], self._group_start[1:], strict=True)

    def _read(self, group: Sequence[Source], group_start: int, positions: np.ndarray) -> Batch:
        parts: list[tuple[np.ndarray, dict[str, torch.Tensor]]] = []
        starts = np.cumsum([group_start, *(len(source.order) for source in group)])
        for source, start, end in zip(group, starts[:-1], starts[1:], strict=True):
            slots = np.flatnonzero((positions >= start) & (positions < end))
            if len(slots) or (not parts and not len(positions)):
                sample = positions[slots] - start
                fields, damages = read_fields(source, Places(np.zeros_like(sample), sample), positions[slots], seed=0)
                parts.append((slots, fields))
                for damage in damages:
                    self._quarantine.add(damage)
        return Batch(with_unit_range(scatter(parts, len(positions))), torch.from_numpy(positions))


def read_split_arrays(config: DataConfig, split: str, *, quarantine_path: Path | None = None) -> dict[str, np.ndarray]:
    """Read a whole (small) split into arrays: the fields of a batch with all samples, in stored order.

    Raises:
        DataError: the settings give pictures several sizes, which make no array.
    """
    if config.buckets is not None:
        raise DataError.of(
            "a split whose pictures have several sizes cannot be read whole",
            where="data.buckets",
            fix="set data.image_size in the place of data.buckets",
        )
    batches = list(EvaluationReader(config, split=split, batch=256, quarantine_path=quarantine_path))
    return {name: torch.cat([batch[name] for batch in batches]).numpy() for name in batches[0].fields}
