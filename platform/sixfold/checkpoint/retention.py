"""Which checkpoints may go once a newer one has verified."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sixfold.checkpoint.config import CheckpointConfig
from sixfold.checkpoint.store import CommittedFolder


def expired(
    committed: Sequence[CommittedFolder], verified: CommittedFolder, rejected: Collection[str], config: CheckpointConfig
) -> list[CommittedFolder]:
    """Return what to delete now that ``verified`` has verified.

    Kept are the ``config.keep`` newest up to it, the milestones, and whatever has a later step (steps abandoned by a
    fall-back go when training has passed them again). Folders in ``rejected`` do not count as kept, and go.

    Args:
        committed: what the store has, newest first.
        verified: the checkpoint just committed and read back.
        rejected: folders that failed to verify in this process.
        config: how many to keep.
    """
    passed = [each for each in committed if each.step <= verified.step]
    superseded = [each for each in passed if each.step == verified.step and each != verified]
    sound = [verified]
    for each in passed:
        if each.folder not in rejected and each.step not in {kept.step for kept in sound}:
            sound.append(each)
    kept = {each.folder for each in sound[: config.keep]}
    if config.keep_every is not None:
        kept |= {each.folder for each in passed if each.step % config.keep_every == 0 and each not in superseded}
    return [each for each in passed if each.folder not in kept]
