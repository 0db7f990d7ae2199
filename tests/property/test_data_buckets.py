"""Buckets and subsets as functions: which sample belongs where, and which batch is of which bucket."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sixfold_data.buckets import nearest_buckets, turn_at
from sixfold_data.choice import Choice
from sixfold_data.config import BucketsConfig, DataConfig, FilterConfig
from sixfold_data.index import ShardEntry, SplitEntry, SplitIndex
from sixfold_data.selection import Chosen

SIDES = st.integers(1, 4000)


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=7).filter(any), st.integers(0, 10**9))
def test_every_bucket_has_its_exact_share_of_batches_in_turn(samples, far):
    period = sum(samples)
    found = [turn_at(batch, samples) for batch in range(2 * period)]
    counts = np.zeros(len(samples), dtype=int)
    for batch, turn in enumerate(found):
        assert turn.batches_before == counts[turn.bucket], "a bucket's batches come one after another"
        counts[turn.bucket] += 1
        share = np.asarray(samples) * (batch + 1) / period
        assert np.all(np.abs(counts - share) <= 0.5 + len(samples) * np.asarray(samples) / period / 2 + 1e-9)
    np.testing.assert_array_equal(counts, 2 * np.asarray(samples))
    bucket, before = turn_at(far * period + period - 1, samples)
    assert (bucket, before - far * samples[bucket]) == found[period - 1]


def test_turns_of_a_billion_samples_are_found_at_once():
    samples = [400_000_000, 300_000_000, 299_999_999, 1]
    for batch in (0, 123_456_789, 999_999_999):
        bucket, before = turn_at(batch, samples)
        assert abs(before - batch * samples[bucket] / 1e9) < 3
    times = [
        (turn_at(batch, samples).bucket, turn_at(batch, samples).batches_before) for batch in range(10**8, 10**8 + 50)
    ]
    assert len(set(times)) == 50


@settings(deadline=None)
@given(
    st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=9, unique_by=lambda shape: shape[1] / shape[0]),
    st.lists(st.tuples(SIDES, SIDES), min_size=1),
)
def test_the_nearest_aspect_ratio_is_found(buckets, pictures):
    height, width = np.asarray(pictures).T
    for (high, wide), number in zip(pictures, nearest_buckets(height, width, buckets).tolist(), strict=True):
        away = [abs(np.log(wide / high) - np.log(b_wide / b_high)) for b_high, b_wide in buckets]
        assert away[number] <= min(away) + 1e-12


@settings(deadline=None)
@given(st.data())
def test_chosen_samples_are_those_the_settings_say_in_stored_order(data):
    """Against a loop over samples: every one of the kept ones has one number in one bucket, whatever the shards."""
    shards = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any))
    small = st.integers(1, 8)
    rows = data.draw(st.lists(st.tuples(small, small, st.integers(-1, 4)), min_size=sum(shards), max_size=sum(shards)))
    bounds = FilterConfig(
        min_width=data.draw(st.none() | small),
        min_height=data.draw(st.none() | small),
        max_aspect_ratio=data.draw(st.none() | st.sampled_from([1.0, 1.5, 2.0])),
        min_caption_bytes=data.draw(st.none() | st.integers(0, 4)),
        max_caption_bytes=data.draw(st.none() | st.integers(0, 4)),
    )
    sizes = data.draw(st.sampled_from([None, ((1, 1),), ((1, 2), (1, 1), (3, 2))]))
    buckets = None if sizes is None else BucketsConfig(sizes=sizes)
    config = DataConfig(path="unused", global_batch=1, filter=bounds, buckets=buckets)
    found = _chosen(config, shards, rows)
    expected: list[list[int]] = [[] for _ in sizes or (None,)]
    for sample, (height, width, caption) in enumerate(rows):
        kept = width >= (bounds.min_width or 0) and height >= (bounds.min_height or 0)
        kept &= max(height, width) <= (bounds.max_aspect_ratio or 99.0) * min(height, width)
        if bounds.by_caption:
            kept &= (bounds.min_caption_bytes or 0) <= caption
            kept &= bounds.max_caption_bytes is None or caption <= bounds.max_caption_bytes
        if kept:
            one = (np.asarray([height]), np.asarray([width]))
            bucket = 0 if buckets is None else int(nearest_buckets(*one, buckets.shapes)[0])
            expected[bucket].append(sample)
    assert found == expected


def _chosen(config: DataConfig, shards: list[int], rows: list[tuple[int, int, int]]) -> list[list[int]]:
    """The samples of each bucket, asked for by number, back to front."""
    entries = tuple(ShardEntry(path=f"{n}.tar", samples=count, size=0, sha256="") for n, count in enumerate(shards))
    height, width, caption = np.asarray(rows).T
    columns = {"key_start": np.zeros(1), "key_bytes": np.zeros(1), "height": height, "width": width}
    columns |= {f"{name}.txt": caption for name in ("offset", "length", "crc32")}
    index = SplitIndex("train", SplitEntry(samples=sum(shards), shards=entries, columns={}), columns)
    choice = Choice(config, index, latents=False, where="here")
    members = SimpleNamespace(store=None, remote=False, index=index)
    parts = [Chosen(members, choice, bucket, counts, held=1) for bucket, counts in enumerate(choice.counts().T)]
    return [part.samples(np.arange(len(part))[::-1])[::-1].tolist() for part in parts]
