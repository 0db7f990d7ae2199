"""Sharing out the writing: every shard once, nobody overloaded, no hole unnoticed."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sixfold.checkpoint.staging import Shard, share_out


def _rows(name, rows, parts, dtype=torch.float32):
    """A matrix of ``rows`` cut into ``parts`` along its first dimension, unevenly."""
    bounds = [rows * part // parts for part in range(parts + 1)]
    return [
        Shard(name, dtype, (rows, 4), (start, 0), (stop - start, 4)) for start, stop in pairwise(bounds) if stop > start
    ]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=12), st.data()
)
def test_every_shard_is_written_exactly_once(tensors, data):
    ranks = 4
    held = [[] for _ in range(ranks)]
    everything = []
    for number, (rows, parts, replicas) in enumerate(tensors):
        for shard in _rows(f"w{number}", rows, parts):
            everything.append(shard)
            for rank in data.draw(st.permutations(range(ranks)))[: min(replicas, ranks)]:
                held[rank].append(shard)
    shares, metadata = share_out(held)
    written = [held[rank][position] for rank in range(ranks) for position in shares[rank]]
    assert sorted(written) == sorted(everything)
    for number, (rows, _, _) in enumerate(tensors):
        tensor = metadata.state_dict_metadata[f"w{number}"]
        assert tensor.size == (rows, 4)
        assert sum(chunk.sizes.numel() for chunk in tensor.chunks) == rows * 4


def test_replicas_are_shared_evenly():
    shards = [shard for number in range(40) for shard in _rows(f"w{number}", 8, 1)]
    shares, _ = share_out([shards] * 8)
    assert [len(share) for share in shares] == [5] * 8


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (_rows("w", 8, 2)[:1], [], "have 16 elements, the tensor 32"),
        (_rows("w", 8, 1), _rows("w", 8, 2)[:1], "have 48 elements"),
        (_rows("w", 8, 1), _rows("w", 9, 1), "w is"),
        (_rows("w", 8, 1), _rows("w", 8, 1, torch.bfloat16), "w is"),
    ],
    ids=["hole", "overlap", "shape", "type"],
)
def test_shards_that_do_not_make_up_a_tensor_are_refused(first, second, message):
    with pytest.raises(ValueError, match=message):
        share_out([first, second])
