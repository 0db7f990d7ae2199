"""Writing one checkpoint so that it either counts or leaves no trace.

    each rank:  write its shards, hashing; read them back
    rank 0:     gather sizes and hashes; write DCP's metadata and the manifest; commit (rename, or marker object);
                read the manifest back; move `latest`; delete what has expired
    each rank:  learn the outcome

A crash at any point leaves the earlier checkpoints whole, and a folder that either does not count or is whole too.
"""

from __future__ import annotations

import errno
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch
from pydantic import JsonValue
from torch.distributed.checkpoint.storage import WriteResult

from sixfold.checkpoint.config import CheckpointConfig
from sixfold.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    METADATA,
    FileRecord,
    Identity,
    Manifest,
    Rejected,
    decode,
    encode,
    hash_stream,
)
from sixfold.checkpoint.ranks import Ranks
from sixfold.checkpoint.retention import expired
from sixfold.checkpoint.staging import FlatState, WritePlan
from sixfold.checkpoint.storage import StoreWriter
from sixfold.checkpoint.store import LATEST, CommittedFolder, Store
from sixfold.errors import EnvironmentFault


@dataclass(frozen=True, kw_only=True)
class CommittedCheckpoint:
    """A checkpoint that counts from now on.

    Attributes:
        step: optimizer steps done.
        uri: where it lies.
        size_bytes: total size of its files.
        write_s: seconds from the end of staging to the commit, on rank 0.
    """

    step: int
    uri: str
    size_bytes: int
    write_s: float


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a rank could not do its part; travels as text, since not every exception survives pickling."""

    rank: int
    number: int | None
    message: str

    @classmethod
    def of(cls, error: Exception, rank: int) -> Failure:
        """Describe an error; one of the operating system by its number and text, any other with its traceback."""
        if isinstance(error, OSError):
            return cls(rank=rank, number=error.errno, message=str(error))
        return cls(rank=rank, number=None, message="".join(traceback.format_exception(error)))


@dataclass(frozen=True, kw_only=True)
class _Written:
    """What a rank reports when its files are written."""

    results: list[WriteResult]
    records: dict[str, FileRecord]
    failure: Failure | None


@dataclass(frozen=True, kw_only=True)
class Transaction:
    """One attempt to write the checkpoint of one step.

    Attributes:
        attempt: unique to this transaction, the same on all ranks.
        rejected: folders that failed to verify earlier in this process.
    """

    store: Store
    ranks: Ranks
    config: CheckpointConfig
    step: int
    attempt: str
    identity: Identity
    extra: dict[str, JsonValue]
    rejected: frozenset[str]

    @property
    def folder(self) -> str:
        """The folder that is written to."""
        return self.store.temporary_name(self.step, self.attempt)

    def run(self, writer: StoreWriter, plan: WritePlan, staged: FlatState) -> CommittedCheckpoint:
        """Write, verify and commit (a collective on the checkpointer's own group).

        Raises:
            EnvironmentFault: on every rank, when any rank's medium failed; the partial folder is gone.
        """
        started = time.monotonic()
        gathered = self.ranks.gather(self._write(writer, plan, staged))
        outcome: CommittedCheckpoint | list[Failure] = []
        if self.ranks.rank == 0:
            outcome = self._conclude(writer, plan, gathered, started)
        outcome = self.ranks.broadcast(outcome)
        if isinstance(outcome, list):
            raise self._fault(outcome)
        return outcome

    def _write(self, writer: StoreWriter, plan: WritePlan, staged: FlatState) -> _Written:
        results: list[WriteResult] = []
        failure = None
        try:
            self.store.make_folder(self.folder)
            results = writer.write(plan, staged)
            self._read_back(writer.files.records)
        except Exception as error:  # every rank must reach the gather, or the others would wait for it
            failure = Failure.of(error, self.ranks.rank)
        return _Written(results=results, records=dict(writer.files.records), failure=failure)

    def _conclude(
        self, writer: StoreWriter, plan: WritePlan, gathered: list[_Written], started: float
    ) -> CommittedCheckpoint | list[Failure]:
        """Commit if every rank has written, clean up otherwise; on rank 0."""
        failures = [written.failure for written in gathered if written.failure is not None]
        committed = None
        try:
            if not failures:
                manifest = self._complete(writer, plan, gathered)
                committed = self.store.commit(self.folder, self.step, self.attempt)
                self._settle(committed, manifest)
                return CommittedCheckpoint(
                    step=self.step,
                    uri=self.store.uri(committed.folder),
                    size_bytes=manifest.size_bytes,
                    write_s=time.monotonic() - started,
                )
        except Exception as error:  # the other ranks wait for the outcome, whatever it is
            failures.append(Failure.of(error, 0))
        if committed is None:
            with suppress(OSError):  # what led here matters more; leftovers are removed at the next start
                self.store.remove(self.folder)
        return failures

    def _complete(self, writer: StoreWriter, plan: WritePlan, gathered: list[_Written]) -> Manifest:
        """Add DCP's metadata and the manifest to the ranks' files."""
        assert plan.metadata is not None, "rank 0 holds the global metadata"
        writer.finish(plan.metadata, [written.results for written in gathered])
        metadata = {METADATA: writer.files.records[METADATA]}
        self._read_back(metadata)
        manifest = self._manifest([*(written.records for written in gathered), metadata])
        with self.store.writer(f"{self.folder}/{MANIFEST}") as stream:
            stream.write(encode(manifest))
        self._check_complete(self.folder, manifest)
        return manifest

    def _settle(self, committed: CommittedFolder, manifest: Manifest) -> None:
        """See that the committed folder is whole where it is now; only then let `latest` and retention rely on it."""
        self._check_complete(committed.folder, manifest)
        self.store.replace(LATEST, committed.folder.encode())
        for each in expired(self.store.committed(), committed, self.rejected, self.config):
            self.store.retire(each, self.attempt)
        for folder in self.store.leftovers():  # without rename, the folder of a checkpoint that was replaced
            self.store.remove(folder)

    def _manifest(self, records: list[dict[str, FileRecord]]) -> Manifest:
        return Manifest(
            format=FORMAT_VERSION,
            step=self.step,
            attempt=self.attempt,
            written_at=datetime.now(UTC).isoformat(timespec="seconds"),
            world_size=self.ranks.size,
            versions=_versions(),
            identity=self.identity,
            extra=self.extra,
            files={name: record for part in records for name, record in sorted(part.items())},
        )

    def _read_back(self, records: dict[str, FileRecord]) -> None:
        """Compare what the medium holds with what was written."""
        if not self.config.verify:
            return
        for name, record in records.items():
            with self.store.reader(f"{self.folder}/{name}") as stream:
                if hash_stream(stream) != record:
                    raise OSError(errno.EIO, "what was read back is not what was written", name)

    def _check_complete(self, folder: str, manifest: Manifest) -> None:
        """Require that rank 0 sees every rank's files and a sound manifest."""
        if decode(self.store.read(f"{folder}/{MANIFEST}")) != manifest:
            raise Rejected(f"{MANIFEST} of {folder} reads back differently")
        sizes = self.store.sizes(folder)
        for name, record in manifest.files.items():
            if sizes.get(name) != record.size_bytes:
                raise OSError(
                    errno.ENOENT,
                    f"rank 0 sees {sizes.get(name, 'no')} bytes of {record.size_bytes} that a rank wrote "
                    "(do all nodes share this folder?)",
                    f"{folder}/{name}",
                )

    def _fault(self, failures: list[Failure]) -> Exception:
        """Return the error a user can act on, or an assertion where the code is at fault."""
        names = f"saving the checkpoint of step {self.step} failed"
        full = [each for each in failures if each.number in (errno.ENOSPC, errno.EDQUOT)]
        if full:
            return EnvironmentFault.of(
                f"{names}: the disk is full or a quota is used up ({_named(full)})",
                where=self.store.location,
                fix="free space there or lower checkpoint.keep, then run again: the earlier checkpoints are intact",
            )
        medium = [each for each in failures if each.number is not None]
        if medium:
            return EnvironmentFault.of(
                f"{names}: {_named(medium)}",
                where=self.store.location,
                fix="check that every node can write there, then run again: the earlier checkpoints are intact",
            )
        return RuntimeError(f"{names}: {_named(failures)}")


def _named(failures: list[Failure]) -> str:
    more = f" and {len(failures) - 1} more ranks" if len(failures) > 1 else ""
    return f"rank {failures[0].rank}: {failures[0].message}{more}"


def _versions() -> dict[str, str]:
    try:
        own = version("sixfold")
    except PackageNotFoundError:  # run from a source tree that is not installed
        own = "unknown"
    return {"sixfold": own, "torch": torch.__version__, "python": sys.version.split()[0]}
