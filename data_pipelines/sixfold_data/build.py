"""Building a data set: the part that all kinds share.

A build writes into ``<out>.tmp-<pid>`` and renames that to ``<out>`` when it is whole, so that no half-built data set
is ever found under the name that was asked for. Which split a sample is in depends on its name alone, so adding files
to an input moves no other file between splits.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sixfold.errors import DataError, EnvironmentFault, Fault
from sixfold_data.index import FORMAT, MANIFEST_NAME, Kind, LatentsEntry, Manifest
from sixfold_data.shards import DEFAULT_SHARD_BYTES, SplitWriter
from sixfold_data.store import write_atomically

TRAIN, VAL = "train", "val"

Progress = Callable[[int, int], None]
"""Called with (files done, files in all)."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What all kinds of build have in common.

    Attributes:
        out: folder to make; must not exist or be empty.
        val_fraction: share of samples (or of a single text's characters) held out as ``val``.
        shard_bytes: size at which a shard is closed.
        corrupt_budget: how many unreadable files are passed over before the build gives up.
        progress: told how far the build is.
    """

    out: Path
    val_fraction: float = 0.1
    shard_bytes: int = DEFAULT_SHARD_BYTES
    corrupt_budget: int = 10
    progress: Progress = lambda done, total: None


@dataclass
class Rejects:
    """The files that could not be used, within a budget."""

    budget: int
    faults: list[Fault] = field(default_factory=list)

    def add(self, file: Path | str, reason: str) -> None:
        """Note one file that could not be read.

        Raises:
            DataError: there are now more than the budget; names them all.
        """
        self.faults.append(Fault(what=reason, where=str(file)))
        if len(self.faults) > self.budget:
            raise DataError(
                Fault(
                    what=f"{len(self.faults)} files could not be read, which is more than the budget of {self.budget}",
                    fix="mend or remove the files below, or allow more with --corrupt-budget",
                ),
                *self.faults,
            )


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What a build made."""

    out: str
    kind: Kind
    samples: Mapping[str, int]
    bytes: Mapping[str, int]
    tokens: Mapping[str, int]
    classes: Sequence[str]
    fingerprint: str
    unreadable: Sequence[Fault]
    remarks: Sequence[str] = ()


class Building:
    """A data set under construction: a staging folder and one writer a split."""

    def __init__(self, staging: Path, options: BuildOptions, writers: dict[str, SplitWriter]) -> None:
        self.writers = writers
        self.rejects = Rejects(options.corrupt_budget)
        self._staging = staging
        self._options = options

    def write_file(self, name: str, content: bytes) -> None:
        """Write a file beside the manifest, which the data set cannot be read without."""
        write_atomically(self._staging / name, content)

    def finish(
        self,
        kind: Kind,
        *,
        classes: Sequence[str] = (),
        tokenizer: Mapping[str, str] | None = None,
        image_size: tuple[int, int] | None = None,
        channels: int | None = None,
        latents: LatentsEntry | None = None,
        remarks: Sequence[str] = (),
    ) -> BuildReport:
        """Write index and manifest and give the data set its name; ``remarks`` are what the user should know of it.

        Raises:
            DataError: a split would have no sample.
        """
        for split, writer in self.writers.items():
            if writer.samples == 0:
                raise DataError.of(
                    f"split {split} would be empty",
                    where=str(self._options.out),
                    fix="give more readable files, or another --val-fraction (0 makes no val split)",
                )
        fields: dict[str, Any] = {
            "format": FORMAT,
            "kind": kind,
            "classes": tuple(classes),
            "tokenizer": None if tokenizer is None else dict(tokenizer),
            "image_size": image_size,
            "channels": channels,
            "latents": latents,
            "splits": {split: writer.finish() for split, writer in self.writers.items()},
        }
        manifest = Manifest(**fields).sealed()
        write_atomically(self._staging / MANIFEST_NAME, manifest.to_bytes())
        self._staging.rename(self._options.out.resolve())
        return BuildReport(
            out=str(self._options.out),
            kind=kind,
            samples={split: writer.samples for split, writer in self.writers.items()},
            bytes={split: writer.bytes_written for split, writer in self.writers.items()},
            tokens={split: entry.tokens for split, entry in manifest.splits.items() if entry.tokens is not None},
            classes=tuple(classes),
            fingerprint=manifest.fingerprint,
            unreadable=tuple(self.rejects.faults),
            remarks=tuple(remarks),
        )


@contextmanager
def building(options: BuildOptions) -> Iterator[Building]:
    """Stage a data set with splits train and (unless the val fraction is 0) val; leave nothing behind on failure.

    Raises:
        DataError: the output is not empty, or an option is out of its range.
        EnvironmentFault: the output cannot be written.
    """
    check_output(options.out)
    if not 0.0 <= options.val_fraction < 1.0:
        raise DataError.of(f"the val fraction is {options.val_fraction}", where="--val-fraction", allowed="0 <= f < 1")
    out = options.out.resolve()
    staging = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        with ExitStack() as stack:
            names = [TRAIN, VAL] if options.val_fraction > 0 else [TRAIN]
            writers = {name: stack.enter_context(SplitWriter(staging, name, options.shard_bytes)) for name in names}
            yield Building(staging, options, writers)
    except OSError as error:
        if isinstance(error, DataError):
            raise
        raise EnvironmentFault.of(
            f"the data set could not be written ({error.strerror or error})",
            where=str(error.filename or staging),
            fix="check the free space of the disk and the right to write there",
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_output(out: Path) -> None:
    """Refuse an output that is a URL or holds something already.

    Raises:
        DataError: it does; says what to do instead.
    """
    if ":/" in str(out):
        raise DataError.of(
            "data sets are built on a local disk",
            where=str(out),
            fix="build into a folder, then copy that to the store",
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError.of(
            "the output exists and is not empty; nothing is overwritten",
            where=str(out),
            fix="name another folder with --out, or remove this one first",
        )
    if out.resolve() == Path.cwd():  # the finished folder takes its name, and the shell would stand in a removed one
        raise DataError.of("the output is the current folder", where=str(out), fix="name a folder inside it with --out")
    out.resolve().parent.mkdir(parents=True, exist_ok=True)


def assign_splits(names: Sequence[str], val_fraction: float) -> list[str]:
    """Return the split of each name: val if the hash of the name, as a number in [0, 1), is below the fraction.

    Where that leaves a split empty although there are two names or more, the name that is nearest to it joins it.
    """
    if val_fraction == 0.0:
        return [TRAIN] * len(names)
    position = [int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest()) / 2.0**64 for name in names]
    splits = [VAL if place < val_fraction else TRAIN for place in position]
    if len(names) > 1 and VAL not in splits:
        splits[position.index(min(position))] = VAL
    if len(names) > 1 and TRAIN not in splits:
        splits[position.index(max(position))] = TRAIN
    return splits


def files_below(folder: Path) -> list[Path]:
    """Return all regular files at any depth in a fixed order, hidden ones and those in hidden folders left out.

    Links that lead nowhere are among them, so that they are named with the other unreadable files.
    """
    found = (file for file in folder.rglob("*") if file.is_file() or (file.is_symlink() and not file.exists()))
    visible = (file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts))
    return sorted(visible, key=lambda file: file.relative_to(folder).as_posix())


class KeyMaker:
    """Turns file names into WebDataset keys: no dots, each once.

    In a tar, everything after the first dot of a base name is the extension; dots in names become ``_``, and a key
    that is taken gets a number.
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def key(self, relative: str) -> str:
        """Return the key for a path relative to the input, its last extension left out."""
        folder, _, name = relative.encode(errors="replace").decode().rpartition("/")
        stem = (name.rpartition(".")[0] or name).replace(".", "_")
        base = f"{folder}/{stem}" if folder else stem
        key, number = base, 1
        while key in self._taken:
            number += 1
            key = f"{base}-{number}"
        self._taken.add(key)
        return key
