"""Reading a verified checkpoint into tensors of any sharding."""

from __future__ import annotations

from sixfold.checkpoint.manifest import Rejected
from sixfold.checkpoint.ranks import Ranks
from sixfold.checkpoint.staging import FlatState
from sixfold.checkpoint.storage import StoreReader, read_metadata_bytes
from sixfold.checkpoint.verification import Candidate
from sixfold.errors import CheckpointError, Fault


def open_reader(candidate: Candidate, ranks: Ranks) -> StoreReader:
    """Open a checkpoint; one rank reads the metadata, which grows with the ranks that wrote it, for all (a collective).

    Raises:
        CheckpointError: on every rank, when it changed or became unreadable after it verified.
    """
    content: bytes | str = b""
    if ranks.rank == 0:
        try:
            content = read_metadata_bytes(candidate.store, candidate.folder, candidate.manifest)
        except (OSError, Rejected) as error:
            content = str(error)
    content = ranks.broadcast(content)
    if isinstance(content, str):
        raise _unloadable(candidate, [content])
    try:
        return StoreReader(candidate.store, candidate.folder, content)
    except Rejected as error:
        raise _unloadable(candidate, [str(error)]) from error


def fill(candidate: Candidate, state: FlatState, ranks: Ranks) -> None:
    """Read every tensor of ``state`` in place. Each rank reads what it needs; only faults are exchanged (a collective).

    Raises:
        CheckpointError: on every rank, when any rank misses a name, has another shape or cannot read.
    """
    faults = ranks.concatenated(_fill_locally(open_reader(candidate, ranks), state))
    if faults:
        raise _unloadable(candidate, faults)


def _fill_locally(reader: StoreReader, state: FlatState) -> list[str]:
    saved = reader.tensors()
    faults = [f"{name} is not in it" for name in state if name not in saved]
    faults += [
        f"{name} has shape {tuple(saved[name].size)} in it, here {tuple(value.shape)}"
        for name, value in state.items()
        if name in saved and saved[name].size != value.shape
    ]
    if faults:
        return faults
    try:
        reader.fill(state)
    except OSError as error:
        return [f"it became unreadable after it verified ({error})"]
    return []


def _unloadable(candidate: Candidate, faults: list[str]) -> CheckpointError:
    head = Fault(
        what="this checkpoint cannot be loaded into this run",
        where=candidate.uri,
        fix="resume with the recipe that wrote it, or start a new run with another --run-dir",
    )
    return CheckpointError(head, *(Fault(what=what) for what in dict.fromkeys(faults)))
