"""Retention never deletes what a resume may need."""

from hypothesis import given
from hypothesis import strategies as st

from sixfold.checkpoint.config import CheckpointConfig
from sixfold.checkpoint.retention import expired
from sixfold.checkpoint.store import CommittedFolder, step_name

_steps = st.sets(st.integers(0, 60), min_size=1, max_size=15)


@given(
    steps=_steps,
    keep=st.integers(1, 5),
    keep_every=st.none() | st.integers(1, 20),
    data=st.data(),
)
def test_the_newest_sound_ones_and_the_milestones_stay(steps, keep, keep_every, data):
    verified_step = data.draw(st.sampled_from(sorted(steps)))
    others = sorted(steps - {verified_step})
    rejected_steps = data.draw(st.sets(st.sampled_from(others))) if others else set()
    committed = [CommittedFolder(step, step_name(step)) for step in sorted(steps, reverse=True)]
    superseded = CommittedFolder(verified_step, f"{step_name(verified_step)}.superseded-x")
    committed.insert([each.step for each in committed].index(verified_step) + 1, superseded)
    verified = CommittedFolder(verified_step, step_name(verified_step))
    rejected = {step_name(step) for step in rejected_steps}

    gone = expired(committed, verified, rejected, CheckpointConfig(keep=keep, keep_every=keep_every))

    left = [each for each in committed if each not in gone]
    assert verified in left
    assert superseded in gone
    assert all(each.step <= verified_step for each in gone), "nothing newer than what verified is touched"
    if keep_every is not None:
        assert all(each == superseded or each.step % keep_every for each in gone)
    sound = sorted((s for s in steps - rejected_steps if s <= verified_step), reverse=True)
    assert {step_name(step) for step in sound[:keep]} <= {each.folder for each in left}
    beyond = [s for s in sound[keep:] if keep_every is None or s % keep_every]
    assert {step_name(step) for step in beyond} <= {each.folder for each in gone}
