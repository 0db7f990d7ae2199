"""Text packed into sequences of fixed length, as a function.

An epoch's *token stream* is all documents in the epoch's order, back to back, each ending with an end-of-text token.
Sequence g takes tokens ``[phase + g L, phase + g L + L + 1)``: L inputs and their L successors, so that neighbouring
sequences share one token and no token is predicted twice. ``phase`` in [0, L) is drawn anew each epoch, so that long
documents are not always cut at the same places.

Where a sequence lies is found by searching cumulative token counts: of blocks of documents, then within one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from sixfold.distributed.randomness import derive_key
from sixfold_data.order import BlockPermutation, StoredOrder, random_words
from sixfold_data.recent import Recent


class Piece(NamedTuple):
    """A run of tokens of one document."""

    document: int
    first_token: int
    tokens: int


class _Block(NamedTuple):
    """The documents of one block in order, and where each ends in the block's part of the token stream."""

    documents: np.ndarray
    token_end: np.ndarray


class Packing:
    """Sequences of ``sequence_length + 1`` tokens over documents in a given order.

    Args:
        token_start: ``[documents + 1]``, cumulative token counts in stored order.
        documents: the order of documents; stored order has no phase.
        group_start: ``[groups + 1]``, the first document of each shard.
        sequence_length: L.
        seed: the recipe's seed.
        blocks_held: how many blocks' cumulative counts are kept.
    """

    def __init__(
        self,
        token_start: Int64[np.ndarray, " documents_plus_one"],
        documents: BlockPermutation | StoredOrder,
        *,
        sequence_length: int,
        seed: int = 0,
        blocks_held: int = 256,
    ) -> None:
        self._token_start = token_start
        self._documents = documents
        self._length = sequence_length
        self._phase_key = derive_key(seed, "packing/phase")
        tokens, kept_for_phase = int(token_start[-1]), 0 if isinstance(documents, StoredOrder) else sequence_length - 1
        self.sequences = max(0, (tokens - 1 - kept_for_phase) // sequence_length)
        self._phases: Recent[int, int] = Recent(4)
        self._block_starts: Recent[int, np.ndarray] = Recent(4)
        self._blocks: Recent[tuple[int, int], _Block] = Recent(blocks_held)

    def phase(self, epoch: int) -> int:
        """Return where in the token stream the epoch's first sequence starts."""
        if isinstance(self._documents, StoredOrder):
            return 0
        return self._phases.get(epoch, lambda: self._draw_phase(epoch))

    def pieces(self, epoch: int, sequence: int) -> Iterator[Piece]:
        """Yield the pieces of documents that make up a sequence, ``sequence_length + 1`` tokens in all."""
        start = self.phase(epoch) + sequence * self._length
        wanted = self._length + 1
        block_starts = self._block_starts.get(epoch, lambda: self._cumulative_blocks(epoch))
        number = int(np.searchsorted(block_starts, start, side="right")) - 1
        start -= int(block_starts[number])
        while wanted:
            block = self._block(epoch, number)
            place = int(np.searchsorted(block.token_end, start, side="right"))
            while wanted and place < len(block.documents):
                document = int(block.documents[place])
                tokens = int(self._token_start[document + 1] - self._token_start[document])
                first = start - (int(block.token_end[place]) - tokens)
                taken = min(wanted, tokens - first)
                if taken:
                    yield Piece(document, first, taken)
                start, wanted, place = start + taken, wanted - taken, place + 1
            start, number = 0, number + 1

    def _draw_phase(self, epoch: int) -> int:
        word = random_words(np.asarray([epoch], dtype=np.int64), 0, self._phase_key)
        return int(word[0]) * self._length >> 32

    def _cumulative_blocks(self, epoch: int) -> np.ndarray:
        """Return where each block starts in the epoch's token stream, and the stream's end."""
        if isinstance(self._documents, StoredOrder):
            return np.asarray([0, self._token_start[-1]], dtype=np.int64)
        layout = self._documents.layout(epoch)
        first, sizes = layout.groups, np.diff(layout.group_position)
        tokens = self._token_start[first + sizes] - self._token_start[first]
        group_token = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(tokens)])
        return group_token[np.searchsorted(layout.group_position, layout.block_position)]

    def _block(self, epoch: int, number: int) -> _Block:
        return self._blocks.get((epoch, number), lambda: self._make_block(epoch, number))

    def _make_block(self, epoch: int, number: int) -> _Block:
        if isinstance(self._documents, StoredOrder):
            return _Block(np.arange(len(self._documents)), self._token_start[1:])
        documents = self._documents.block(epoch, number)
        return _Block(documents, np.cumsum(self._token_start[documents + 1] - self._token_start[documents]))
