"""Packed text against a packer that simply concatenates everything and cuts."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sixfold_data.order import BlockPermutation, StoredOrder, group_starts
from sixfold_data.packing import Packing

# Token counts of documents by shard; 0 is an empty document.
SHARDS = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=6), min_size=1, max_size=6)


def tokens_of(document: int, first: int, count: int) -> list[tuple[int, int]]:
    return [(document, number) for number in range(first, first + count)]


def whole_stream(order, documents: np.ndarray, counts: list[int]) -> list[tuple[int, int]]:
    return [token for document in documents for token in tokens_of(int(document), 0, counts[document])]


@settings(deadline=None)
@given(SHARDS, st.integers(1, 3), st.integers(1, 20), st.integers(0, 3))
def test_sequences_are_cuts_of_the_shuffled_documents(shards, groups_per_block, length, epoch):
    counts = [count for shard in shards for count in shard]
    order = BlockPermutation(group_starts([len(shard) for shard in shards]), groups_per_block, seed=2, purpose="test")
    packing = Packing(group_starts(counts), order, sequence_length=length, seed=2)
    stream = whole_stream(order, order(epoch, np.arange(len(counts))), counts)
    phase = packing.phase(epoch)
    assert 0 <= phase < length
    assert packing.sequences == max(0, (len(stream) - length) // length)
    for sequence in range(packing.sequences):
        start = phase + sequence * length
        pieces = list(packing.pieces(epoch, sequence))
        found = [token for piece in pieces for token in tokens_of(*piece)]
        assert found == stream[start : start + length + 1]
        assert len({piece.document for piece in pieces}) == len(pieces), "a document is one piece of a sequence"


@settings(deadline=None)
@given(SHARDS, st.integers(1, 20))
def test_stored_order_loses_less_than_one_sequence(shards, length):
    counts = [count for shard in shards for count in shard]
    packing = Packing(group_starts(counts), StoredOrder(len(counts)), sequence_length=length)
    stream = whole_stream(None, np.arange(len(counts)), counts)
    predicted = []
    for sequence in range(packing.sequences):
        found = [token for piece in packing.pieces(0, sequence) for token in tokens_of(*piece)]
        predicted += found[1:]
    assert predicted == stream[1 : 1 + packing.sequences * length]
    assert len(stream) - 1 - len(predicted) < length or not stream


def test_phases_differ_between_epochs():
    order = BlockPermutation(group_starts([1]), 1, seed=0, purpose="test")
    packing = Packing(group_starts([10_000]), order, sequence_length=100, seed=0)
    assert len({packing.phase(epoch) for epoch in range(20)}) > 10
