"""The global batches as a map-style data set: item s is a rank's part of the batch after s consumed samples."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from sixfold.distributed.randomness import derive_key
from sixfold.errors import DataError, SixfoldError
from sixfold_data.buckets import turn_at
from sixfold_data.config import DataConfig
from sixfold_data.describe import check_alike
from sixfold_data.mixture import Mixture
from sixfold_data.order import Places, Slots, batch_slots, lane_samples, random_words
from sixfold_data.quarantine import Damage
from sixfold_data.reading import read_fields, scatter
from sixfold_data.sources import Source, open_sources

_BATCHES_AHEAD = 16
"""How far ahead remote shards are fetched whole into the node's cache."""


class Fetched(NamedTuple):
    """One item: the fields and positions of a batch, what was damaged on the way, or the error that prevented it.

    On the way between processes small fields are arrays.
    """

    fields: Mapping[str, Any]
    positions: np.ndarray
    damages: list[Damage]
    error: SixfoldError | None


class GlobalBatches(Dataset[Fetched]):
    """Item s is a rank's part of the global batch that begins after s consumed samples.

    With buckets, each is a source of its own with lanes of its own, and each global batch is of one of them.

    It opens its sources where it is first used, so that a worker process makes its own connections and memory maps.
    """

    def __init__(self, config: DataConfig, *, seed: int, rank: int, world_size: int) -> None:
        self._config = config
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._mixture = Mixture(config.mixture_parts, config.lane_count)
        self._flip_key = derive_key(seed, "horizontal_flip")
        self._opened: list[Source] | None = None
        self._prefetched_samples = 0

    @property
    def sources(self) -> list[Source]:
        """The data sets of the mixture, or the buckets of the one data set."""
        if self._opened is None:
            opened = [self._open(path) for path in self._config.paths]
            check_alike([sources[0].manifest for sources in opened], self._config.paths)
            self._opened = list(itertools.chain.from_iterable(opened))
        return self._opened

    @property
    def left_out(self) -> int:
        """Samples of buckets that have fewer samples than there are lanes, which are never read."""
        return sum(len(source.order) for source in self.sources if len(source.order) < self._config.lane_count)

    def __getitem__(self, start_samples: int) -> Fetched:
        try:
            self._prefetch(start_samples)
            return self._read(start_samples)
        except SixfoldError as error:
            # Handed over as a value: the loader would turn an exception of a worker into a text with its traceback.
            return Fetched({}, np.empty(0, dtype=np.int64), [], error)

    def places(self, start_samples: int) -> Iterator[tuple[Source, np.ndarray, Places]]:
        """Yield, for each source, which of the rank's slots in a global batch it fills, and with what."""
        if self._config.buckets is None:
            yield from self._mixed(self._slots(start_samples))
        else:
            yield self._of_one_bucket(start_samples // self._config.global_batch)

    def _slots(self, start_samples: int) -> Slots:
        return batch_slots(
            start_samples,
            global_batch=self._config.global_batch,
            lanes=self._config.lane_count,
            rank=self._rank,
            world_size=self._world_size,
        )

    def _mixed(self, slots: Slots) -> Iterator[tuple[Source, np.ndarray, Places]]:
        source_of_slot = self._mixture.source(slots.lane, slots.cursor)
        for number, source in enumerate(self.sources):
            here = np.flatnonzero(source_of_slot == number)
            if len(here):
                lane = slots.lane[here]
                cursor = self._mixture.cursor(source_of_slot[here], lane, slots.cursor[here])
                yield source, here, lane_samples(source.order, self._config.lane_count, lane, cursor)

    def _of_one_bucket(self, batch: int) -> tuple[Source, np.ndarray, Places]:
        """Return the bucket of a global batch, in the place of a source that fills all slots."""
        lanes = self._config.lane_count
        # What the lanes hold: one period of turns is then as many whole epochs in every bucket.
        turn = turn_at(batch, [len(source.order) // lanes * lanes for source in self.sources])
        slots = self._slots(turn.batches_before * self._config.global_batch)
        source = self.sources[turn.bucket]
        return source, np.arange(len(slots.lane)), lane_samples(source.order, lanes, slots.lane, slots.cursor)

    def _read(self, start_samples: int) -> Fetched:
        positions = self._slots(start_samples).position
        parts, damages = [], []
        for source, here, places in self.places(start_samples):
            fields, damaged = read_fields(source, places, positions[here], seed=self._seed)
            parts.append((here, fields))
            damages += damaged
        fields = scatter(parts, len(positions))
        if self._config.horizontal_flip and "image" in fields:
            mirrored = torch.from_numpy(random_words(positions, 0, self._flip_key) & 1).bool()
            fields["image"][mirrored] = fields["image"][mirrored].flip(-1)
        return Fetched(fields, positions, damages, None)

    def _prefetch(self, start_samples: int) -> None:
        """Begin to bring the shards of the batches up to ``_BATCHES_AHEAD`` near."""
        sources = [source for source in self.sources if source.remote]
        last = start_samples + _BATCHES_AHEAD * self._config.global_batch
        while sources and self._prefetched_samples < last:
            self._prefetched_samples = max(self._prefetched_samples, start_samples) + self._config.global_batch
            for source, _, places in self.places(self._prefetched_samples):
                source.prefetch(places)

    def _open(self, path: str) -> list[Source]:
        lanes = self._config.lane_count
        sources = open_sources(self._config, path, self._config.splits.train, seed=self._seed, lanes=lanes)
        samples = max(len(source.order) for source in sources)
        if samples < lanes:
            bucket = "" if self._config.buckets is None else " in its largest bucket"
            raise DataError.of(
                f"the split {self._config.splits.train!r} has {samples} samples{bucket}, fewer than {lanes} lanes",
                where=path,
                fix="choose a smaller data.lanes (and data.global_batch), or a shorter data.sequence_length for text",
            )
        return sources

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


def end_with_rank(_worker: int) -> None:
    """Have this loader process end when the rank that started it has, which a killed one tells nobody.

    The loader's own parent is the fork server, which lives as long as a loader does: neither would ever end.
    """
    rank = multiprocessing.parent_process()
    assert rank is not None, "a loader is started by multiprocessing"

    def watch() -> None:
        rank.join()
        os._exit(1)

    threading.Thread(target=watch, name="watch-rank", daemon=True).start()
