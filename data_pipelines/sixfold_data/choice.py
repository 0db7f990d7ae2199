"""Which samples of a split the settings choose, and for which bucket, by the columns of its index."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int64

from sixfold.errors import DataError
from sixfold_data.buckets import nearest_buckets
from sixfold_data.config import DataConfig, FilterConfig
from sixfold_data.index import SplitIndex

_LEFT_OUT = -1


class Choice:
    """The settings' choice among a split's samples.

    Args:
        config: the ``data`` section.
        index: the split's index.
        latents: whether samples are latents, which have a bucket's size or are at fault.
        where: the data set, for messages.

    Raises:
        DataError: the index lacks what the settings ask about.
    """

    def __init__(self, config: DataConfig, index: SplitIndex, *, latents: bool, where: str) -> None:
        self.index = index
        self._filter = config.filter or FilterConfig()
        self._buckets = None if config.buckets is None else config.buckets.shapes
        self._latents, self._where = latents, where
        self._by_size = self._filter.by_size or self._buckets is not None
        if self._by_size and (index.height is None or index.width is None):
            raise DataError.of(
                f"the index of split {index.name!r} has no widths and heights to filter or bucket by",
                where=where,
                fix="encode the latents again with `sixfold data encode`"
                if latents
                else "index the shards again with `sixfold data index`",
            )
        if self._filter.by_caption and index.caption_bytes is None:
            raise DataError.of(
                "data.filter asks for captions of some length, and the samples have no captions",
                where=where,
                fix="remove min_caption_bytes and max_caption_bytes, or name captioned images",
            )

    @property
    def is_everything(self) -> bool:
        """Whether all samples are chosen, in one bucket."""
        return not (self._by_size or self._filter.by_caption)

    def counts(self) -> Int64[np.ndarray, "shards buckets"]:
        """Return how many samples are chosen of each shard in each bucket."""
        buckets, start = len(self._buckets or (None,)), self.index.shard_start
        if self.is_everything:
            return np.diff(start)[:, None]
        counted = [np.bincount(self.buckets(shard) + 1, minlength=buckets + 1)[1:] for shard in range(len(start) - 1)]
        return np.asarray(counted, dtype=np.int64).reshape(-1, buckets)

    def buckets(self, shard: int) -> Int64[np.ndarray, " samples"]:
        """Return the bucket of each sample of a shard (0 where there are none), -1 where it is left out."""
        run = slice(*self.index.shard_start[shard : shard + 2].tolist())
        chosen = np.zeros(run.stop - run.start, dtype=np.int64)
        if self._by_size:
            assert self.index.height is not None, "checked at opening"
            assert self.index.width is not None, "checked at opening"
            height, width = self.index.height[run].astype(np.int64), self.index.width[run].astype(np.int64)
            known = (height > 0) & (width > 0)
            height, width = np.where(known, height, 1), np.where(known, width, 1)
            kept = known & self._fits(height, width)
            if self._buckets is not None:
                chosen = self._bucket_of(height, width, self._buckets, kept)
            chosen = np.where(kept, chosen, _LEFT_OUT)
        if self._filter.by_caption:
            assert self.index.caption_bytes is not None, "checked at opening"
            length, bounds = self.index.caption_bytes[run], self._filter
            kept = length >= (bounds.min_caption_bytes or 0)
            if bounds.max_caption_bytes is not None:
                kept &= length <= bounds.max_caption_bytes
            chosen = np.where(kept, chosen, _LEFT_OUT)
        return chosen

    def _fits(self, height: np.ndarray, width: np.ndarray) -> Bool[np.ndarray, " n"]:
        bounds = self._filter
        fits: np.ndarray = (height >= (bounds.min_height or 0)) & (width >= (bounds.min_width or 0))
        if bounds.max_aspect_ratio is not None:
            fits &= np.maximum(height, width) <= bounds.max_aspect_ratio * np.minimum(height, width)
        return fits

    def _bucket_of(
        self, height: np.ndarray, width: np.ndarray, buckets: Sequence[tuple[int, int]], kept: np.ndarray
    ) -> Int64[np.ndarray, " n"]:
        number = nearest_buckets(height, width, buckets)
        if self._latents:
            sizes = np.asarray(buckets)[number]
            strange = np.flatnonzero(kept & ((sizes[:, 0] != height) | (sizes[:, 1] != width)))
            if len(strange):
                first = strange[0]
                raise DataError.of(
                    f"latents of {width[first]}x{height[first]} cells are of none of data.buckets",
                    where=self._where,
                    allowed=", ".join(f"{wide}x{high}" for high, wide in buckets),
                    fix="name the buckets they were encoded in (their sizes over the codec's factor), or encode again",
                )
        return number
