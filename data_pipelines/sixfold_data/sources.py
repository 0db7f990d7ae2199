"""One split of one data set as samples that can be read by number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from sixfold.errors import DataError
from sixfold_data.config import DataConfig
from sixfold_data.images import ImageSource
from sixfold_data.index import Manifest, open_split, read_manifest
from sixfold_data.latents import LatentSource
from sixfold_data.members import MemberReader, Row, Unreadable
from sixfold_data.order import EpochOrder, Places
from sixfold_data.selection import choose
from sixfold_data.store import open_store
from sixfold_data.text import TextSource
from sixfold_data.text_features import WithText


class Source(Protocol):
    """Samples that can be read by number.

    Attributes:
        order: their order in each epoch.
        manifest: the data set they belong to.
        remote: whether fetching ahead is worth while.
    """

    order: EpochOrder
    manifest: Manifest
    remote: bool

    def rows(self, places: Places) -> list[Row | Unreadable]:
        """Read and decode some samples.

        Raises:
            DataError: a shard is not the one that was indexed.
        """
        ...

    def fields(self, rows: Sequence[Row], places: Places) -> dict[str, Tensor]:
        """Return decoded samples as the fields of a batch."""
        ...

    def prefetch(self, places: Places) -> None:
        """Begin to bring the shards of some samples near."""
        ...


def open_sources(config: DataConfig, path: str, split: str, *, seed: int | None, lanes: int = 1) -> list[Source]:
    """Open one split of one data set: one source for each of the settings' buckets, or one in all.

    Args:
        config: settings of the ``data`` section.
        path: folder or URL of the data set.
        split: name of the split.
        seed: of the shuffle; None keeps the stored order.
        lanes: lanes that will be read side by side.

    Raises:
        DataError: the data set is malformed or lacks the split, or the settings do not fit its kind.
    """
    store = open_store(path, config.cache)
    manifest = read_manifest(store)
    members = MemberReader(store, open_split(store, manifest, split))
    if manifest.kind == "text":
        return [TextSource(config, manifest, members, seed=seed, lanes=lanes)]
    if config.sequence_length is not None:
        raise DataError.of(
            f"a data set of kind {manifest.kind} has no sequences",
            where=path,
            fix="remove data.sequence_length, or name a text data set",
        )
    latents = manifest.kind == "latents"
    kind = LatentSource if latents else ImageSource
    buckets = (None,) if config.buckets is None else config.buckets.shapes
    parts = choose(config, members, latents=latents, lanes=lanes)
    sources: list[Source] = [
        kind(config, manifest, chosen, bucket=bucket, seed=seed, lanes=lanes)
        for bucket, chosen in zip(buckets, parts, strict=True)
    ]
    return [WithText(*pair) for pair in zip(sources, parts, strict=True)] if manifest.text else sources
