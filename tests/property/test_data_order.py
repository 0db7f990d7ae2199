"""The order of samples: a permutation each epoch, in lanes, of exact proportions, whatever the ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sixfold_data.mixture import Mixture
from sixfold_data.order import (
    BlockPermutation,
    StoredOrder,
    batch_slots,
    group_starts,
    lane_samples,
    random_permutation,
)

GROUPS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


@settings(deadline=None)
@given(GROUPS, st.integers(1, 5), st.integers(0, 3), st.integers(0, 2**40))
def test_each_epoch_is_a_permutation_that_keeps_shards_of_a_block_together(sizes, groups_per_block, seed, epoch):
    starts = group_starts(sizes)
    order = BlockPermutation(starts, groups_per_block, seed=seed, purpose="test")
    samples = order(epoch, np.arange(len(order)))
    assert sorted(samples.tolist()) == list(range(sum(sizes)))
    groups = np.searchsorted(starts, samples, side="right") - 1
    bounds = order.layout(epoch).block_position
    for first, end in itertools.pairwise(bounds):
        members = set(groups[first:end].tolist())
        assert len(members) <= groups_per_block
        assert not members & set(groups[end:].tolist()), "a shard is read in one block only"


@settings(deadline=None)
@given(GROUPS, st.integers(1, 5), st.data())
def test_any_position_can_be_asked_for_alone(sizes, groups_per_block, data):
    order = BlockPermutation(group_starts(sizes), groups_per_block, seed=1, purpose="test")
    whole = order(3, np.arange(len(order)))
    wanted = np.asarray(data.draw(st.lists(st.integers(0, len(order) - 1), min_size=1)))
    fresh = BlockPermutation(group_starts(sizes), groups_per_block, seed=1, purpose="test", blocks_held=1)
    np.testing.assert_array_equal(fresh(3, wanted), whole[wanted])


def test_epochs_seeds_and_blocks_are_shuffled_apart():
    order = BlockPermutation(group_starts([50] * 4), 2, seed=0, purpose="test")
    everything = np.arange(200)
    other_seed = BlockPermutation(group_starts([50] * 4), 2, seed=1, purpose="test")
    assert np.mean(order(0, everything) == order(1, everything)) < 0.1
    assert np.mean(order(0, everything) == other_seed(0, everything)) < 0.1
    assert np.mean(order(0, everything[:100]) % 100 == order(0, everything[100:]) % 100) < 0.1


def test_permutations_of_four_are_uniform():
    """24 permutations of 4 numbers over 4,800 streams: chi-square with 23 degrees of freedom, 99.99% quantile 56."""
    drawn = [tuple(random_permutation(4, 0, stream, (3, 5)).tolist()) for stream in range(4_800)]
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 56


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 5), st.integers(0, 300))
def test_slots_follow_the_stated_formula(lanes, per_lane, step, samples):
    """Slot j of step t is ``perm[c * (N // C) + t * (B / C) + j % (B / C)]`` with ``c = j // (B / C)``, epoch 0."""
    batch, total = lanes * per_lane, samples + lanes * per_lane * 6
    slots = batch_slots(step * batch, global_batch=batch, lanes=lanes)
    order = BlockPermutation(group_starts([total]), 1, seed=7, purpose="test")
    permuted = order(0, np.arange(total))
    found = lane_samples(order, lanes, slots.lane, slots.cursor)
    expected = [permuted[(j // per_lane) * (total // lanes) + step * per_lane + j % per_lane] for j in range(batch)]
    np.testing.assert_array_equal(found.sample, expected)
    assert not found.epoch.any()
    np.testing.assert_array_equal(slots.position, step * batch + np.arange(batch))


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 9))
def test_ranks_share_whole_lanes_and_together_read_the_global_batch(world_size, lanes_each, per_lane, step):
    lanes = world_size * lanes_each
    batch = lanes * per_lane
    whole = batch_slots(step * batch, global_batch=batch, lanes=lanes)
    parts = [
        batch_slots(step * batch, global_batch=batch, lanes=lanes, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for name in whole._fields:
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(whole, name))
    owned = [set(part.lane.tolist()) for part in parts]
    assert sum(map(len, owned)) == len(set.union(*owned))


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(5, 60), st.lists(st.integers(1, 4), min_size=1, max_size=8))
def test_lanes_go_on_evenly_when_the_batch_size_changes(lanes, samples, multiples):
    """Whatever the batch sizes, an epoch gives each sample at most once, all but the remainder."""
    order = StoredOrder(samples)
    consumed, seen = 0, []
    while consumed < (samples // lanes) * lanes:
        batch = lanes * multiples[consumed % len(multiples)]
        slots = batch_slots(consumed, global_batch=batch, lanes=lanes)
        places = lane_samples(order, lanes, slots.lane, slots.cursor)
        seen += places.sample[places.epoch == 0].tolist()
        consumed += batch
    assert len(seen) == len(set(seen)) == (samples // lanes) * lanes


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 9), st.integers(0, 10**6))
def test_mixture_is_exact_in_every_period_of_every_lane(parts, lanes, start):
    mixture = Mixture(parts, lanes)
    for lane in range(lanes):
        index = np.arange(start, start + sum(parts))
        found = mixture.source(np.full_like(index, lane), index)
        np.testing.assert_array_equal(np.bincount(found, minlength=len(parts)), parts)


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 9), st.integers(0, 200))
def test_mixture_cursor_counts_what_went_before(parts, lanes, steps):
    mixture = Mixture(parts, lanes)
    index = np.arange(steps)
    for lane in range(lanes):
        before = np.bincount(mixture.source(np.full_like(index, lane), index), minlength=len(parts))
        sources = np.arange(len(parts))
        cursor = mixture.cursor(sources, np.full_like(sources, lane), np.full_like(sources, steps))
        np.testing.assert_array_equal(cursor, before)


@pytest.mark.parametrize("parts", [(7, 3), (1, 1), (501, 499), (90, 9, 1), (1, 1000)])
@pytest.mark.parametrize(("lanes", "per_lane"), [(64, 1), (64, 4), (500, 1), (12, 3)])
def test_every_global_batch_has_the_proportions_within_rounding(parts, lanes, per_lane):
    """At one index the lanes stand evenly round the circle: each row of lanes is within one sample of its share."""
    mixture = Mixture(parts, lanes)
    share = np.asarray(parts) / sum(parts)
    for step in range(20):
        slots = batch_slots(step * lanes * per_lane, global_batch=lanes * per_lane, lanes=lanes)
        counts = np.bincount(mixture.source(slots.lane, slots.cursor), minlength=len(parts))
        assert np.all(np.abs(counts - share * lanes * per_lane) <= per_lane)
