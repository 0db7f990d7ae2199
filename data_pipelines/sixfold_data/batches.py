"""The global batches as a map-style data set: item s is a rank's part of the batch after s consumed samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sixfold.distributed.randomness import derive_key
from sixfold.errors import DataError, SixfoldError
from sixfold_data.config import DataConfig
from sixfold_data.describe import check_alike
from sixfold_data.mixture import Mixture
from sixfold_data.order import Places, Slots, batch_slots, lane_samples, random_words
from sixfold_data.quarantine import Damage
from sixfold_data.reading import read_fields, scatter
from sixfold_data.sources import Source, open_source

_BATCHES_AHEAD = 16
"""How far ahead remote shards are fetched whole into the node's cache."""


class Fetched(NamedTuple):
    """One item: the fields and positions of a batch, what was damaged on the way, or the error that prevented it."""

    fields: dict[str, Tensor]
    positions: Tensor
    damages: list[Damage]
    error: SixfoldError | None


class GlobalBatches(Dataset[Fetched]):
    """Item s is a rank's part of the global batch that begins after s consumed samples.

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
        """The data sets of the mixture."""
        if self._opened is None:
            self._opened = [self._open(path) for path in self._config.paths]
            check_alike([source.manifest for source in self._opened], self._config.paths)
        return self._opened

    def __getitem__(self, start_samples: int) -> Fetched:
        try:
            slots = self._slots(start_samples)
            self._prefetch(start_samples)
            fields, damages = self._read(slots)
        except SixfoldError as error:
            # Handed over as a value: the loader would turn an exception of a worker into a text with its traceback.
            return Fetched({}, torch.empty(0, dtype=torch.int64), [], error)
        return Fetched(fields, torch.from_numpy(slots.position), damages, None)

    def _slots(self, start_samples: int) -> Slots:
        return batch_slots(
            start_samples,
            global_batch=self._config.global_batch,
            lanes=self._config.lane_count,
            rank=self._rank,
            world_size=self._world_size,
        )

    def places(self, slots: Slots) -> Iterator[tuple[Source, np.ndarray, Places]]:
        """Yield, for each source, which of the slots it fills and with which of its samples."""
        source_of_slot = self._mixture.source(slots.lane, slots.cursor)
        for number, source in enumerate(self.sources):
            here = np.flatnonzero(source_of_slot == number)
            if len(here):
                lane = slots.lane[here]
                cursor = self._mixture.cursor(source_of_slot[here], lane, slots.cursor[here])
                yield source, here, lane_samples(source.order, self._config.lane_count, lane, cursor)

    def _read(self, slots: Slots) -> tuple[dict[str, Tensor], list[Damage]]:
        parts, damages = [], []
        for source, here, places in self.places(slots):
            fields, damaged = read_fields(source, places, slots.position[here], seed=self._seed)
            parts.append((here, fields))
            damages += damaged
        fields = scatter(parts, len(slots.position))
        if self._config.horizontal_flip and "image" in fields:
            mirrored = torch.from_numpy(random_words(slots.position, 0, self._flip_key) & 1).bool()
            fields["image"][mirrored] = fields["image"][mirrored].flip(-1)
        return fields, damages

    def _prefetch(self, start_samples: int) -> None:
        """Begin to bring the shards of the batches up to ``_BATCHES_AHEAD`` near."""
        sources = [source for source in self.sources if source.remote]
        last = start_samples + _BATCHES_AHEAD * self._config.global_batch
        while sources and self._prefetched_samples < last:
            self._prefetched_samples = max(self._prefetched_samples, start_samples) + self._config.global_batch
            for source, _, places in self.places(self._slots(self._prefetched_samples)):
                source.prefetch(places)

    def _open(self, path: str) -> Source:
        lanes = self._config.lane_count
        source = open_source(self._config, path, self._config.splits.train, seed=self._seed, lanes=lanes)
        if len(source.order) < lanes:
            raise DataError.of(
                f"the split {self._config.splits.train!r} has {len(source.order)} samples, fewer than {lanes} lanes",
                where=path,
                fix="choose a smaller data.lanes (and data.global_batch), or a shorter data.sequence_length for text",
            )
        return source

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}
