"""Finding the newest checkpoint that verifies, and saying loudly why newer ones do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sixfold.checkpoint.manifest import MANIFEST, Manifest, Rejected, decode, hash_stream
from sixfold.checkpoint.ranks import Ranks
from sixfold.checkpoint.store import LATEST, CommittedFolder, Store, open_store
from sixfold.errors import CheckpointError, EnvironmentFault, Fault

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A checkpoint that verified.

    Attributes:
        step: optimizer steps done.
        uri: where it lies.
        manifest: what it consists of and belongs to.
        store: the store that holds it.
        folder: its folder within the store.
        rejected: newer ones that did not verify: folder to reason.
    """

    step: int
    uri: str
    manifest: Manifest
    store: Store
    folder: str
    rejected: dict[str, str]


def newest_verified(location: Path | str, log: Log, *, step: int | None = None) -> Candidate | None:
    """Return the newest checkpoint at ``location`` that verifies, in a single process; see :func:`search`."""
    return search(open_store(location), Ranks(None), log, step=step)


def search(store: Store, ranks: Ranks, log: Log, *, step: int | None = None) -> Candidate | None:
    """Return the newest checkpoint whose every file hashes to what its manifest says (a collective).

    Only one of the given ``step`` counts, if one is given. The ranks share the hashing and agree on the outcome.
    ``log`` is called on rank 0 for every checkpoint that is passed over, with the reason.

    Raises:
        CheckpointError: there are checkpoints but none verifies; starting over must be the user's decision.
        EnvironmentFault: the store cannot be listed.
    """
    rejected: dict[str, str] = {}
    for committed in _listed(store, ranks):
        if step is not None and committed.step != step:
            continue
        outcome = _verify(store, committed, ranks)
        if isinstance(outcome, Manifest):
            if ranks.rank == 0 and step is None:
                _note_stale_latest(store, committed, rejected, log)
            return Candidate(
                step=committed.step,
                uri=store.uri(committed.folder),
                manifest=outcome,
                store=store,
                folder=committed.folder,
                rejected=rejected,
            )
        rejected[committed.folder] = outcome
        if ranks.rank == 0:
            log(f"checkpoint {store.uri(committed.folder)} is rejected: {outcome}; falling back to the one before")
    if rejected:
        raise CheckpointError(
            Fault(
                what="none of the checkpoints verifies",
                where=store.location,
                fix="restore one from a copy, or start over with another --run-dir",
            ),
            *(Fault(what=reason, where=folder) for folder, reason in rejected.items()),
        )
    return None


def _listed(store: Store, ranks: Ranks) -> list[CommittedFolder]:
    found: list[CommittedFolder] | str = []
    if ranks.rank == 0:
        try:
            found = store.committed()
        except OSError as error:
            found = str(error)
    found = ranks.broadcast(found)
    if isinstance(found, str):
        raise EnvironmentFault.of(f"checkpoints cannot be listed: {found}", where=store.location)
    return found


def _verify(store: Store, committed: CommittedFolder, ranks: Ranks) -> Manifest | str:
    """Return the manifest, or why the checkpoint is to be rejected; the same on every rank."""
    outcome = ranks.broadcast(_read_manifest(store, committed) if ranks.rank == 0 else "")
    if isinstance(outcome, str):
        return outcome
    faults = ranks.concatenated(file_faults(store, committed.folder, outcome, _share(outcome, ranks)))
    return "; ".join(faults) if faults else outcome


def _read_manifest(store: Store, committed: CommittedFolder) -> Manifest | str:
    try:
        manifest = decode(store.read(f"{committed.folder}/{MANIFEST}"))
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error})"
    except Rejected as error:
        return str(error)
    if manifest.step != committed.step:
        return f"{MANIFEST} is of step {manifest.step}"
    return manifest


def _share(manifest: Manifest, ranks: Ranks) -> list[str]:
    """Return the files that this rank hashes: dealt out by size."""
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].size_bytes, name))
    return by_size[ranks.rank :: ranks.size]


def file_faults(store: Store, folder: str, manifest: Manifest, names: Sequence[str]) -> list[str]:
    """Return what is wrong with the named files of a checkpoint, compared with its manifest."""
    faults = []
    for name in names:
        expected = manifest.files[name]
        try:
            with store.reader(f"{folder}/{name}") as stream:
                found = hash_stream(stream)
        except FileNotFoundError:
            faults.append(f"{name} is missing")
        except OSError as error:
            faults.append(f"{name} cannot be read ({error})")
        else:
            if found.size_bytes != expected.size_bytes:
                faults.append(f"{name} has {found.size_bytes} bytes, the manifest says {expected.size_bytes}")
            elif found.sha256 != expected.sha256:
                faults.append(f"{name} does not match its hash: its content changed after it was written")
    return faults


def _note_stale_latest(store: Store, committed: CommittedFolder, rejected: dict[str, str], log: Log) -> None:
    """Say so when ``latest`` names something else: it is moved last, so a crash can leave it behind."""
    try:
        named = store.read(LATEST).decode(errors="replace").strip()
    except FileNotFoundError:
        named = "nothing"
    if named != committed.folder and named not in rejected:
        log(f"`{LATEST}` names {named}; the newest checkpoint that verifies is {store.uri(committed.folder)}")
