"""Reading a verified checkpoint into tensors of any sharding."""

from __future__ import annotations

from sixfold.checkpoint.manifest import Rejected
from sixfold.checkpoint.ranks import Ranks
from sixfold.checkpoint.staging import FlatState
from sixfold.checkpoint.storage import StoreReader
from sixfold.checkpoint.verification import Candidate
from sixfold.errors import CheckpointError, Fault


def fill(candidate: Candidate, state: FlatState, ranks: Ranks) -> None:
    """Read every tensor of ``state`` in place. Each rank reads what it needs; only faults are exchanged (a collective).

    Raises:
        CheckpointError: on every rank, when any rank misses a name, has another shape or cannot read.
    """
    faults = ranks.concatenated(_fill_locally(candidate, state))
    if faults:
        head = Fault(
            what="this checkpoint cannot be loaded into this run",
            where=candidate.uri,
            fix="resume with the recipe that wrote it, or start a new run (another --run-dir, or --resume never)",
        )
        raise CheckpointError(head, *(Fault(what=what) for what in dict.fromkeys(faults)))


def _fill_locally(candidate: Candidate, state: FlatState) -> list[str]:
    try:
        reader = StoreReader(candidate.store, candidate.folder, candidate.manifest)
        saved = reader.tensors()
        faults = [f"{name} is not in it" for name in state if name not in saved]
        faults += [
            f"{name} has shape {tuple(saved[name].size)} in it, here {tuple(value.shape)}"
            for name, value in state.items()
            if name in saved and saved[name].size != value.shape
        ]
        if not faults:
            reader.fill(state)
    except (OSError, Rejected) as error:
        return [f"it changed or became unreadable after it verified: {error}"]
    return faults
