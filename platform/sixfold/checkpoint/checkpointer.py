"""Saving and restoring a run: the public face of checkpointing."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from pydantic import JsonValue
from torch import Tensor

from sixfold.checkpoint.config import CheckpointConfig
from sixfold.checkpoint.manifest import Identity, require_same_identity
from sixfold.checkpoint.ranks import Ranks
from sixfold.checkpoint.reading import fill
from sixfold.checkpoint.staging import Planning, StagingBuffers, flatten_roles
from sixfold.checkpoint.storage import StoreWriter
from sixfold.checkpoint.store import open_store
from sixfold.checkpoint.transaction import CommittedCheckpoint, Transaction
from sixfold.checkpoint.verification import Candidate, Log, search
from sixfold.distributed.randomness import RNG_VERSION
from sixfold.errors import EnvironmentFault


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """What one save cost the training loop.

    Attributes:
        stall_s: seconds the loop was held up: waiting for the save before, planning, staging (and, if not asynchronous,
            writing).
        skipped: whether there was nothing to do, since this process has already saved or loaded this step.
    """

    stall_s: float
    skipped: bool = False


class Checkpointer:
    """Writes and restores the checkpoints of one run; the same calls in the same order on every rank.

    A save copies this rank's share of the state to the CPU, which blocks, and writes it in a thread, which does not.
    At most one save is in flight: the next one waits for it. Errors of the thread are raised by the next call here.

    Args:
        directory: a local or shared folder, or an fsspec URL.
        config: when to save and what to keep.
        group: a gloo group of all ranks for this checkpointer alone (:func:`~sixfold.checkpoint.ranks.new_group`);
            ``None`` for one process.
        rank: this process among all.
        world_size: how many there are.
        recipe_hash: hash of the resolved recipe, for the record.
        fingerprint: the data set's; a checkpoint of another one is refused.
        settings: recipe settings, nested or by dotted name, that a resumed run must share with its checkpoint.

    Raises:
        EnvironmentFault: the directory cannot be used, or is not shared by all ranks.
    """

    def __init__(
        self,
        directory: Path | str,
        config: CheckpointConfig,
        *,
        group: dist.ProcessGroup | None,
        rank: int,
        world_size: int,
        recipe_hash: str,
        fingerprint: str,
        settings: Mapping[str, JsonValue] | None = None,
    ) -> None:
        self._ranks = Ranks(group)
        assert (self._ranks.rank, self._ranks.size) == (rank, world_size), "the group must be of all ranks"
        self._config = config
        self._store = open_store(directory)
        self._identity = Identity(
            recipe_hash=recipe_hash, fingerprint=fingerprint, rng_version=RNG_VERSION, settings=dict(settings or {})
        )
        self._planning = Planning(self._ranks)
        self._buffers = StagingBuffers()
        self._done_steps: set[int] = set()
        self._rejected: set[str] = set()
        self._saves = 0
        self._thread: threading.Thread | None = None
        self._outcome: CommittedCheckpoint | Exception | None = None  # the thread's only word to the training thread
        self._committed: list[CommittedCheckpoint] = []
        self._token = self._open()

    def save(self, step: int, states: Mapping[str, Mapping[str, Tensor]], extra: Mapping[str, JsonValue]) -> SaveReport:
        """Save the state of all roles after ``step`` steps.

        Args:
            step: optimizer steps done.
            states: role to its engine's ``checkpoint_state()``; may change as soon as this returns.
            extra: state that is not tensors (progress, data position, objective), as JSON values.

        Raises:
            EnvironmentFault: this save (if synchronous) or the one before could not be written.
        """
        started = time.monotonic()
        self.wait()
        if step in self._done_steps:
            return SaveReport(stall_s=time.monotonic() - started, skipped=True)
        self._saves += 1
        transaction = Transaction(
            store=self._store,
            ranks=self._ranks,
            config=self._config,
            step=step,
            attempt=f"{self._token}.{self._saves}",
            identity=self._identity,
            extra=_snapshot(extra),
            rejected=frozenset(self._rejected),
        )
        state = flatten_roles(states)
        writer = StoreWriter(self._store, transaction.folder, self._ranks.rank)
        plan = self._planning.plan(state)
        staged = self._buffers.stage(state, plan)

        def write() -> None:
            try:
                self._outcome = transaction.run(writer, plan, staged)
            except Exception as error:  # raised again in the training thread, by the next call
                self._outcome = error

        # A daemon: a rank that dies while others wait for it must not keep their interpreters from ending.
        self._thread = threading.Thread(target=write, name=f"checkpoint-{step}", daemon=True)
        self._thread.start()
        if not self._config.asynchronous:
            self.wait()
        return SaveReport(stall_s=time.monotonic() - started)

    def poll(self) -> list[CommittedCheckpoint]:
        """Return the checkpoints committed since the last call, without waiting.

        Raises:
            EnvironmentFault: the save in flight has failed.
        """
        if self._thread is not None and not self._thread.is_alive():
            self.wait()
        committed, self._committed = self._committed, []
        return committed

    def wait(self) -> None:
        """Wait for the save in flight; what it committed is returned by the next :meth:`poll`.

        Raises:
            EnvironmentFault: it could not be written.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, Exception):
            raise outcome
        assert outcome is not None, "the thread ended without an outcome"
        self._done_steps.add(outcome.step)
        self._committed.append(outcome)

    def newest_verified(self, log: Log) -> Candidate | None:
        """Return the newest checkpoint that verifies, agreed by all ranks (a collective).

        ``log`` is called on rank 0 for every newer one that does not, with the reason.

        Raises:
            CheckpointError: there are checkpoints but none verifies.
        """
        self.wait()
        candidate = search(self._store, self._ranks, log)
        if candidate is not None:
            self._rejected.update(candidate.rejected)
        return candidate

    def load(self, candidate: Candidate, templates: Mapping[str, Mapping[str, Tensor]]) -> dict[str, JsonValue]:
        """Fill the templates in place, whatever their sharding, and return the saved ``extra`` (a collective).

        Raises:
            CheckpointError: the checkpoint belongs to another recipe or lacks what a template asks for.
        """
        self.wait()
        require_same_identity(candidate.manifest.identity, self._identity, where=candidate.uri)
        fill(candidate, flatten_roles(templates), self._ranks)
        self._done_steps = {candidate.step}
        return dict(candidate.manifest.extra)

    def close(self) -> None:
        """Wait for the save in flight and release the staging buffers."""
        try:
            self.wait()
        finally:
            self._buffers = StagingBuffers()

    def _open(self) -> str:
        """Remove what dead attempts left, check that all ranks see what rank 0 writes, return this attempt's token."""
        token = self._ranks.broadcast(secrets.token_hex(4))
        folder = self._store.temporary_name(0, token)
        faults = self._ranks.concatenated(self._prepare(folder) if self._ranks.rank == 0 else [])
        if not faults:
            faults = self._ranks.concatenated(self._look_for(folder))
            if self._ranks.rank == 0:
                self._store.remove(folder)
        if faults:
            raise EnvironmentFault.of(
                f"checkpoints cannot be kept there: {faults[0]}",
                where=self._store.location,
                fix="name a folder (--run-dir) that every node shares and may write to",
            )
        return token

    def _prepare(self, folder: str) -> list[str]:
        try:
            self._store.create()
            for leftover in self._store.leftovers():
                self._store.remove(leftover)
            self._store.make_folder(folder)
            with self._store.writer(f"{folder}/probe") as stream:
                stream.write(b"\0")
        except OSError as error:
            return [str(error)]
        return []

    def _look_for(self, folder: str) -> list[str]:
        try:
            self._store.read(f"{folder}/probe")
        except OSError as error:
            return [f"rank {self._ranks.rank} does not see what rank 0 writes ({error})"]
        return []


def _snapshot(extra: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return a deep copy, having made sure that the manifest will give back exactly what was put in."""
    copy: dict[str, JsonValue] = json.loads(json.dumps(dict(extra), allow_nan=False))
    assert copy == dict(extra), "extra must be plain JSON: string keys, lists, no tuples"
    return copy
