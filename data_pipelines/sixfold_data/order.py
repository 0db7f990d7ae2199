"""The order of samples as a pure function of (seed, epoch, position), cut into lanes.

``perm(seed, epoch)`` permutes the shards, cuts them into blocks of K, and permutes the samples within each block. It is
evaluated block by block where it is asked for; apart from the shard table, only the blocks in use are held.

``perm`` is cut into C equal contiguous *lanes*, each an endless stream over the epochs. The global batch of B samples
takes B/C consecutive samples from each lane: slot j of a step belongs to lane ``j // (B/C)``. A rank takes a contiguous
slice of slots, hence whole lanes, hence its own shards. The order itself knows nothing of ranks, workers or restarts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int64

from sixfold.distributed.randomness import RNG_VERSION, derive_key, philox
from sixfold_data.recent import Recent

ORDER_VERSION = f"lanes-of-shard-blocks/1 {RNG_VERSION}"
"""Recorded in every checkpoint; changing any order below requires a new version."""

_MASK = 0xFFFFFFFF


class EpochOrder(Protocol):
    """A permutation of ``len(order)`` samples for each epoch."""

    def __len__(self) -> int: ...

    def __call__(self, epoch: int, positions: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Return the samples at some positions of an epoch."""
        ...


class StoredOrder:
    """The samples as they are stored, in every epoch."""

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def __call__(self, epoch: int, positions: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Return the positions themselves."""
        return positions


class Layout(NamedTuple):
    """One epoch: the first samples of its groups in order, and where groups and blocks start in it (ends included)."""

    groups: np.ndarray
    group_position: np.ndarray
    block_position: np.ndarray


class BlockPermutation:
    """Groups permuted, cut into blocks of ``groups_per_block``, samples permuted within each block.

    Args:
        group_start: ``[groups + 1]``, the first sample of each group (shard); the last entry is the number of samples.
        groups_per_block: how many consecutive groups of the permuted order are shuffled together.
        seed: the recipe's seed.
        purpose: separates the draws of different orders.
        permute_groups: whether the groups themselves are permuted.
        blocks_held: how many permuted blocks are kept; fewer than are in use at once is slow, not wrong.
    """

    def __init__(
        self,
        group_start: Int64[np.ndarray, " groups_plus_one"],
        groups_per_block: int,
        *,
        seed: int,
        purpose: str,
        permute_groups: bool = True,
        blocks_held: int = 256,
    ) -> None:
        self._group_start = group_start
        self._groups_per_block = groups_per_block
        self._permute_groups = permute_groups
        self._group_key = derive_key(seed, f"order/{purpose}/groups")
        self._sample_key = derive_key(seed, f"order/{purpose}/samples")
        self._layouts: Recent[int, Layout] = Recent(4)
        self._blocks: Recent[tuple[int, int], np.ndarray] = Recent(blocks_held)

    def __len__(self) -> int:
        return int(self._group_start[-1])

    def __call__(self, epoch: int, positions: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Return the samples at some positions of an epoch."""
        layout = self.layout(epoch)
        block = np.searchsorted(layout.block_position, positions, side="right") - 1
        shuffled = np.empty_like(positions)
        for number in np.unique(block).tolist():
            here = block == number
            start = layout.block_position[number]
            shuffled[here] = start + self._block(epoch, number)[positions[here] - start]
        return self._unshuffled(layout, shuffled)

    def block(self, epoch: int, number: int) -> Int64[np.ndarray, " samples"]:
        """Return all samples of one block in order."""
        layout = self.layout(epoch)
        return self._unshuffled(layout, layout.block_position[number] + self._block(epoch, number).astype(np.int64))

    def layout(self, epoch: int) -> Layout:
        """Return the epoch's order of groups, and where groups and blocks start in it (ends included)."""
        return self._layouts.get(epoch, lambda: self._make_layout(epoch))

    @staticmethod
    def _unshuffled(layout: Layout, position: np.ndarray) -> np.ndarray:
        """Return the samples at positions of the epoch before the shuffle within blocks."""
        slot = np.searchsorted(layout.group_position, position, side="right") - 1
        sample: np.ndarray = layout.groups[slot] + (position - layout.group_position[slot])
        return sample

    def _make_layout(self, epoch: int) -> Layout:
        sizes = np.diff(self._group_start)
        order = random_permutation(len(sizes), epoch, 0, self._group_key) if self._permute_groups else slice(None)
        position = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes[order])])
        bounds = [*range(0, len(sizes), self._groups_per_block), len(sizes)]
        return Layout(self._group_start[:-1][order], position, position[bounds])

    def _block(self, epoch: int, number: int) -> np.ndarray:
        """Return the permutation within a block, in the smallest integers that hold it."""

        def make() -> np.ndarray:
            size = int(np.diff(self.layout(epoch).block_position[number : number + 2])[0])
            return random_permutation(size, epoch, number + 1, self._sample_key).astype(np.min_scalar_type(size))

        return self._blocks.get((epoch, number), make)


def random_permutation(size: int, epoch: int, stream: int, key: tuple[int, int]) -> Int64[np.ndarray, " size"]:
    """Return a permutation of ``size < 2**32`` numbers: the stable argsort of random words, one a number."""
    index = np.arange((size + 3) // 4, dtype=np.int64)
    zeros = np.zeros_like(index)
    words = np.concatenate(philox((index, zeros + stream, zeros + (epoch & _MASK), zeros + (epoch >> 32)), key))[:size]
    # Sorting (word, index) pairs packed in 64 bits equals a stable argsort and is vectorised.
    packed = np.sort((words.astype(np.uint64) << np.uint64(32)) | np.arange(size, dtype=np.uint64))
    return (packed & np.uint64(_MASK)).astype(np.int64)


def random_words(index: Int64[np.ndarray, " n"], stream: int, key: tuple[int, int]) -> Int64[np.ndarray, " n"]:
    """Return one 32-bit random word for each 64-bit index."""
    zeros = np.zeros_like(index)
    return philox((index & _MASK, (index >> 32) & _MASK, zeros + stream, zeros), key)[0]


class Slots(NamedTuple):
    """Some slots of a global batch: their lane, their place in the lane's endless stream, and their global position."""

    lane: np.ndarray
    cursor: np.ndarray
    position: np.ndarray


def batch_slots(start_samples: int, *, global_batch: int, lanes: int, rank: int = 0, world_size: int = 1) -> Slots:
    """Return a rank's slots of the global batch that begins after ``start_samples`` consumed samples.

    Every lane has then given ``start_samples / lanes`` samples whatever the batch sizes were, so the batch size may
    change between steps without disturbing the order.
    """
    assert start_samples % lanes == 0, "samples are consumed evenly from all lanes"
    assert global_batch % lanes == 0, "lanes divide the global batch"
    assert lanes % world_size == 0, "ranks divide lanes"
    from_each_lane, share = global_batch // lanes, global_batch // world_size
    slot = np.arange(rank * share, (rank + 1) * share, dtype=np.int64)
    return Slots(slot // from_each_lane, start_samples // lanes + slot % from_each_lane, start_samples + slot)


class Places(NamedTuple):
    """Samples of one source: the epoch each is read in, and its number."""

    epoch: np.ndarray
    sample: np.ndarray


def lane_samples(order: EpochOrder, lanes: int, slots_lane: np.ndarray, slots_index: np.ndarray) -> Places:
    """Return the samples at indices of the lanes' endless streams.

    In each epoch a lane takes ``len(order) // lanes`` samples, lane c those from ``c * (len(order) // lanes)`` on; the
    remainder of the permutation is left out of that epoch.
    """
    per_lane = len(order) // lanes
    epoch, within = np.divmod(slots_index, per_lane)
    position = slots_lane * per_lane + within
    sample = np.empty_like(position)
    for number in np.unique(epoch).tolist():
        here = epoch == number
        sample[here] = order(number, position[here])
    return Places(epoch, sample)


def group_starts(sizes: Sequence[int]) -> Int64[np.ndarray, " groups_plus_one"]:
    """Return where groups of the given sizes start, and their end."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.asarray(sizes, dtype=np.int64))])
