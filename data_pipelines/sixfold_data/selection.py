"""The chosen samples of a split, numbered and read as if there were no others.

A chosen sample has a *number*: its rank among the chosen ones of its bucket in stored order. Orders, lanes and
replacements know numbers alone; here they become samples of the split, shard by shard where they are asked for. At
opening, the columns that matter are read through once, to count; only the counts of the shards, and the samples of
shards in use, are held.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from sixfold.errors import DataError
from sixfold_data.choice import Choice
from sixfold_data.config import DataConfig
from sixfold_data.members import MemberReader, Unreadable, epoch_order
from sixfold_data.order import EpochOrder, group_starts
from sixfold_data.recent import Recent


class Chosen:
    """The samples of one bucket of a split, read by their numbers; a view of a :class:`MemberReader`.

    Attributes:
        store: where the shards are.
        remote: whether fetching ahead is worth while.
        split_samples: samples of the whole split, chosen or not.
    """

    def __init__(self, members: MemberReader, choice: Choice, bucket: int, counts: np.ndarray, *, held: int) -> None:
        self.store, self.remote = members.store, members.remote
        self.split_samples = len(members.index)
        self._members, self._choice, self._bucket = members, choice, bucket
        self._start = group_starts(counts.tolist())
        self._shards: Recent[int, np.ndarray] = Recent(held)

    def __len__(self) -> int:
        return int(self._start[-1])

    def order(self, config: DataConfig, *, seed: int | None, lanes: int) -> EpochOrder:
        """Return the order of numbers: shuffled by the settings, or as stored without a seed."""
        return epoch_order(config, self._start, seed=seed, lanes=lanes)

    def samples(self, numbers: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Return the samples of the split that have some numbers."""
        if self._choice.is_everything:
            return numbers
        shards = np.searchsorted(self._start, numbers, side="right") - 1
        samples = np.empty_like(numbers)
        for shard in np.unique(shards).tolist():
            here = shards == shard
            within = self._of_shard(shard)[numbers[here] - self._start[shard]]
            samples[here] = self._choice.index.shard_start[shard] + within
        return samples

    def read(self, extensions: Sequence[str], numbers: np.ndarray) -> list[bytes | Unreadable]:
        """Return one whole member of each sample, the first of the extensions that it has."""
        return self._members.read(extensions, self.samples(numbers))

    def labels(self, numbers: np.ndarray) -> Int64[np.ndarray, " n"] | None:
        """Return the class of each sample, where the split has classes."""
        label = self._members.index.label
        return None if label is None else label[self.samples(numbers)].astype(np.int64)

    def unreadable(self, number: int, reason: str) -> Unreadable:
        """Return the event that a sample cannot be read."""
        return self._members.unreadable(int(self.samples(np.asarray([number]))[0]), reason)

    def prefetch(self, numbers: np.ndarray) -> None:
        """Begin to bring the shards of some samples near."""
        self._members.prefetch(self.samples(numbers))

    def _of_shard(self, shard: int) -> np.ndarray:
        """Return where in a shard its chosen samples are, in the smallest integers that hold it."""

        def find() -> np.ndarray:
            buckets = self._choice.buckets(shard)
            return np.flatnonzero(buckets == self._bucket).astype(np.min_scalar_type(len(buckets)))

        return self._shards.get(shard, find)


def choose(config: DataConfig, members: MemberReader, *, latents: bool, lanes: int) -> list[Chosen]:
    """Return the chosen samples of a split, those of each bucket apart.

    Raises:
        DataError: the index lacks what the settings ask about, or they leave no sample.
    """
    choice = Choice(config, members.index, latents=latents, where=members.store.url)
    counts = choice.counts()
    if len(members.index) and not counts.any():
        assert config.filter is not None, "buckets leave no sample out"
        raise DataError.of(
            f"data.filter leaves none of the {len(members.index)} samples of split {members.index.name!r}",
            where=members.store.url,
            allowed=config.filter.text,
            fix="widen the bounds of data.filter",
        )
    held = (2 * lanes + 16) * config.shuffle_block_shards  # the shards of as many blocks as the order holds
    return [Chosen(members, choice, bucket, counts[:, bucket], held=held) for bucket in range(counts.shape[1])]
