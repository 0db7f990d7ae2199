"""What a configured data set is, from its index alone: what recipes are checked against and run records keep."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sixfold.errors import DataError
from sixfold_data.choice import Choice
from sixfold_data.config import DataConfig
from sixfold_data.index import Kind, LatentsEntry, Manifest, TextFeaturesEntry, open_split, read_manifest
from sixfold_data.store import Store, open_store
from sixfold_data.tokenizers import Tokenizer, make_tokenizer


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """A data set, or all data sets of a mixture together.

    Attributes:
        kind: what a sample is.
        samples: samples (documents for text) by split, without those that the settings' filter leaves out.
        tokens: tokens by split; empty unless text.
        sequences: packed training sequences by split; empty unless text.
        classes: class names by label number; empty when unlabelled.
        image_size: height and width in pixels of decoded images, None for text and where they have several.
        channels: of decoded images, None for text.
        vocabulary_size: tokens of the tokenizer, None without one.
        tokenizer: of text or captions, None without.
        fingerprint: SHA-256 of the content.
        latents: what latents are and which codec decodes them; ``image_size`` and ``channels`` are then the latents'.
        buckets: heights and widths of the settings' buckets; empty without, and ``image_size`` is None with them.
        text: features of captions that the samples come with, by the identity of the encoder that made them.
    """

    kind: Kind
    samples: Mapping[str, int]
    tokens: Mapping[str, int]
    sequences: Mapping[str, int]
    classes: tuple[str, ...]
    image_size: tuple[int, int] | None
    channels: int | None
    vocabulary_size: int | None
    tokenizer: Tokenizer | None
    fingerprint: str
    latents: LatentsEntry | None = None
    buckets: tuple[tuple[int, int], ...] = ()
    text: Mapping[str, TextFeaturesEntry] = field(default_factory=dict)

    @property
    def captioned(self) -> bool:
        """Whether each sample has a caption."""
        return self.kind != "text" and self.tokenizer is not None


def combined_fingerprint(manifests: Sequence[Manifest]) -> str:
    """Return the fingerprint of one data set, or a hash of those of a mixture in order."""
    fingerprints = [manifest.fingerprint for manifest in manifests]
    return fingerprints[0] if len(fingerprints) == 1 else hashlib.sha256("/".join(fingerprints).encode()).hexdigest()


def check_alike(manifests: Sequence[Manifest], paths: Sequence[str]) -> None:
    """Raise DataError unless all data sets of a mixture make batches of the same fields and shapes."""
    for manifest, path in zip(manifests, paths, strict=True):
        for name in ("kind", "classes", "tokenizer", "image_size", "channels", "latents", "text"):
            expected, found = _comparable(manifests[0], name), _comparable(manifest, name)
            if expected != found:
                raise DataError.of(
                    f"{name} is {found!r}, but {expected!r} in {paths[0]}",
                    where=path,
                    fix=f"mix only data sets with the same {name}",
                )


def _comparable(manifest: Manifest, name: str) -> object:
    """A property of a data set, less what a mixture need not share: its latents' source."""
    value = getattr(manifest, name)
    return value.model_copy(update={"source": ""}) if isinstance(value, LatentsEntry) else value


def describe(config: DataConfig) -> DataInfo:
    """Describe the configured data from their manifests.

    Raises:
        DataError: a data set is missing or malformed, or those of a mixture do not fit together.
    """
    stores = [open_store(path, config.cache) for path in config.paths]
    manifests = [read_manifest(store) for store in stores]
    check_alike(manifests, config.paths)
    first = manifests[0]
    splits = set.intersection(*(set(manifest.splits) for manifest in manifests))
    samples = {
        name: sum(_count(config, store, manifest, name) for store, manifest in zip(stores, manifests, strict=True))
        for name in sorted(splits)
    }
    tokens, sequences = {}, {}
    if first.kind == "text":
        tokens = {name: sum(manifest.splits[name].tokens or 0 for manifest in manifests) for name in samples}
    length = config.sequence_length
    if length is not None:
        sequences = {
            name: sum(max(0, (manifest.splits[name].tokens or 0) - 1) // length for manifest in manifests)
            for name in tokens
        }
    tokenizer = None if first.tokenizer is None else make_tokenizer(first.tokenizer, stores[0])
    size = first.image_size if config.image_size is None else (config.image_size, config.image_size)
    channels: int | None = first.channels
    if first.latents is not None:
        size, channels = first.latents.size, first.latents.channels
    if config.buckets is not None:
        size = None
    return DataInfo(
        kind=first.kind,
        samples=samples,
        tokens=tokens,
        sequences=sequences,
        classes=first.classes,
        image_size=None if first.kind == "text" else size,
        channels=None if first.kind == "text" else channels,
        vocabulary_size=None if tokenizer is None else tokenizer.vocabulary_size,
        tokenizer=tokenizer,
        fingerprint=combined_fingerprint(manifests),
        latents=first.latents,
        text=first.text,
        buckets=() if config.buckets is None else config.buckets.shapes,
    )


def _count(config: DataConfig, store: Store, manifest: Manifest, split: str) -> int:
    """How many samples of a split the settings choose."""
    if config.filter is None:
        return manifest.splits[split].samples
    latents = manifest.kind == "latents"
    return int(Choice(config, open_split(store, manifest, split), latents=latents, where=store.url).counts().sum())
