"""Indexing WebDataset tars that were made elsewhere: the shards stay as they are, the index is written beside them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, BinaryIO

from sixfold.errors import DataError, Fault
from sixfold_data.index import FORMAT, MANIFEST_NAME, Kind, Manifest, SplitIndexWriter
from sixfold_data.store import Store
from sixfold_data.tars import TarSample, scan_tar
from sixfold_data.tokenizers import ByteTokenizer, make_tokenizer
from sixfold_data.traits import FAULTS_NAMED, Traits

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_TAR_NAME = re.compile(r"\.(tar|tar\.gz|tgz|tar\.zst|tar\.bz2|tar\.xz)$")

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """What was indexed, and what was passed over on the way."""

    url: str
    kind: Kind
    samples: Mapping[str, int]
    shards: Mapping[str, int]
    classes: Sequence[str]
    fingerprint: str
    replaced_fingerprint: str | None
    remarks: Sequence[Fault]


def index_shards(
    store: Store,
    *,
    splits: Mapping[str, str] | None = None,
    classes: Sequence[str] = (),
    progress: Progress = lambda done, total: None,
) -> IndexReport:
    """Index every tar of a store and write the manifest and columns into it; an index that is there is replaced.

    Args:
        store: where the shards lie; remote shards are fetched into the cache once.
        splits: patterns of shard paths by split name; by default a tar's folder or the first word of its name says it
            (``train``, ``val``/``valid``/``validation``, ``test``), and what says nothing is ``train``.
        classes: class names by label number; by default as many numbers as labels need.
        progress: told (shards done, shards in all).

    Raises:
        DataError: there is no tar, a tar is compressed or damaged, a sample is unreadable, or the samples have no
            common kind; all faults at once.
    """
    shards = [path for path in store.list() if _TAR_NAME.search(path)]
    if not shards:
        raise DataError.of("there are no tar files here", where=store.url, fix="name the folder that holds the shards")
    by_split = _assign(shards, splits)
    scan = _Scan(store, classes)
    total = sum(map(len, by_split.values()))
    done = 0
    for split, paths in by_split.items():
        for path in paths:
            scan.add(split, path)
            done += 1
            progress(done, total)
    return scan.write()


def _assign(shards: Sequence[str], patterns: Mapping[str, str] | None) -> dict[str, list[str]]:
    """Return the shards of each split; with patterns, shards that match none are left out."""
    by_split: dict[str, list[str]] = {}
    for path in shards:
        if patterns is None:
            split: str | None = split_of(path)
        else:
            split = next((name for name, pattern in patterns.items() if fnmatchcase(path, pattern)), None)
        if split is not None:
            by_split.setdefault(split, []).append(path)
    missing = sorted(set(patterns or ()) - set(by_split))
    if missing:
        assert patterns is not None
        raise DataError(
            *(
                Fault(
                    what=f"no tar matches {patterns[name]!r}",
                    where=f"--split {name}=...",
                    fix=f"patterns are matched with paths such as {shards[0]!r}; the first match counts",
                )
                for name in missing
            )
        )
    return by_split


def split_of(path: str) -> str:
    """Return the split that a shard's folder or name tells of: ``faces/val/0001.tar`` and ``val-0001.tar`` are val."""
    folders, name = path.split("/")[:-1], path.rpartition("/")[2]
    for word in [*reversed(folders), re.split(r"[-_.0-9]", name)[0], *re.split(r"[-_.]", name)]:
        if word.lower() in _SPLIT_WORDS:
            return _SPLIT_WORDS[word.lower()]
    return "train"


class _Scan:
    """Goes through shards one by one and gathers the index of each split."""

    def __init__(self, store: Store, classes: Sequence[str]) -> None:
        self.faults: list[Fault] = []
        self._remarks: list[Fault] = []
        self._store = store
        self._former = _former_manifest(store)
        self._traits = Traits(classes=classes)
        self._writers: dict[str, SplitIndexWriter] = {}
        self._shards: Counter[str] = Counter()
        self._samples: Counter[str] = Counter()

    def add(self, split: str, path: str) -> None:
        """Index one shard; what is wrong with it is gathered in ``faults``."""
        file = self._store.local_path(path)
        where = f"{self._store.url}/{path}"
        try:
            contents = scan_tar(file, where)
        except DataError as error:
            self.faults.extend(error.faults)
            return
        self._remark(where, "stands there twice; the first one counts", contents.duplicates)
        self._remark(where, "has no extension, so it belongs to no sample", contents.without_key)
        writer = self._writers.setdefault(split, SplitIndexWriter(split))
        strangers = []
        with file.open("rb") as raw:
            digest = hashlib.file_digest(raw, "sha256").hexdigest()
            for sample in contents.samples:
                noted = self._traits.note(sample, partial(_read_member, raw, sample), where)
                if noted is None:
                    strangers.append(sample.key)
                    continue
                writer.add_sample(sample.key, sample.members, **noted._asdict())
                self._samples[split] += 1
        self._remark(where, "has neither an image nor tokens and is no sample", strangers)
        writer.end_shard(path, size=file.stat().st_size, sha256=digest, etag=self._store.etag(path))
        self._shards[split] += 1

    def write(self) -> IndexReport:
        """Write columns and then the manifest.

        Raises:
            DataError: samples are at fault or have no common kind.
        """
        self.faults.extend(self._traits.faults)
        if self.faults:
            raise DataError(*self.faults)
        kind = self._traits.kind(self._store.url)
        sizes, channels = self._traits.sizes, self._traits.channels
        splits = {}
        for name, writer in self._writers.items():
            splits[name], files = writer.finish()
            for path, content in files:
                self._store.write_file(path, content)
        fields: dict[str, Any] = {
            "format": FORMAT,
            "kind": kind,
            "classes": self._traits.class_names(),
            "tokenizer": self._tokenizer(kind),
            "image_size": next(iter(sizes)) if len(sizes) == 1 else None,
            "channels": max(channels, default=None),
            "splits": splits,
        }
        manifest = Manifest(**fields).sealed()
        self._store.write_file(MANIFEST_NAME, manifest.to_bytes())
        return IndexReport(
            url=self._store.url,
            kind=kind,
            samples=dict(self._samples),
            shards=dict(self._shards),
            classes=manifest.classes,
            fingerprint=manifest.fingerprint,
            replaced_fingerprint=self._former.get("fingerprint"),
            remarks=tuple(self._remarks),
        )

    def _tokenizer(self, kind: Kind) -> dict[str, str] | None:
        """Return the tokenizer's record: the former index's; without one, bytes where all tokens are such."""
        former = self._former.get("tokenizer")
        if kind == "images":
            return None
        if former is not None:
            return dict(make_tokenizer(former, self._store).description())
        if self._traits.highest_token > ByteTokenizer.end_of_text:
            raise DataError.of(
                f"the shards hold token {self._traits.highest_token}, which is no byte, and no index explains it",
                where=f"{self._store.url}/{MANIFEST_NAME}",
                fix="restore the former manifest beside the shards, or build again with `sixfold data build text`",
            )
        return ByteTokenizer().description()

    def _remark(self, where: str, what: str, names: Sequence[str]) -> None:
        for name in names[:FAULTS_NAMED]:
            self._remarks.append(Fault(what=f"{name!r} {what}", where=where))
        if len(names) > FAULTS_NAMED:
            self._remarks.append(Fault(what=f"so it is with {len(names) - FAULTS_NAMED} more members", where=where))


def _read_member(raw: BinaryIO, sample: TarSample, extension: str) -> bytes:
    place = sample.members[extension]
    raw.seek(place.offset)
    return raw.read(place.length)


def _former_manifest(store: Store) -> dict[str, Any]:
    """Return what an index that is to be replaced said, as far as it can be read."""
    try:
        former = json.loads(store.read_file(MANIFEST_NAME))
    except (FileNotFoundError, ValueError):
        return {}
    return former if isinstance(former, dict) else {}
