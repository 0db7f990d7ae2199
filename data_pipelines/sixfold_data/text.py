"""Text, packed into sequences of fixed length, as samples that can be read by number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sixfold.errors import DataError
from sixfold_data.config import DataConfig
from sixfold_data.index import Manifest
from sixfold_data.members import MemberReader, Row, Unreadable, epoch_order
from sixfold_data.order import BlockPermutation, EpochOrder, Places, StoredOrder
from sixfold_data.packing import Packing
from sixfold_data.tokenizers import make_tokenizer, storage_extension


class TextSource:
    """Text: fields ``tokens``, ``documents`` and ``token_bytes``, sequences packed from documents."""

    def __init__(
        self, config: DataConfig, manifest: Manifest, members: MemberReader, *, seed: int | None, lanes: int
    ) -> None:
        where, index = members.store.url, members.index
        if config.sequence_length is None:
            raise DataError.of(
                "a text data set needs the length of its sequences", where=where, fix="set data.sequence_length"
            )
        if index.token_start is None or manifest.tokenizer is None:
            raise DataError.of(
                f"split {index.name} has no token counts or no tokenizer",
                where=where,
                fix="build the data set again with `sixfold data build text`",
            )
        self.manifest = manifest
        self.remote = members.remote
        self._members = members
        self._length = config.sequence_length
        self._tokenizer = make_tokenizer(manifest.tokenizer, members.store)
        self._extension = storage_extension(self._tokenizer.vocabulary_size)
        documents = epoch_order(config, index.shard_start, seed=seed, lanes=lanes)
        self._packing = Packing(
            index.token_start,
            documents,
            sequence_length=self._length,
            seed=seed or 0,
            blocks_held=2 * lanes + 16,
        )
        self.order: EpochOrder = StoredOrder(self._packing.sequences)
        if seed is not None:
            self.order = BlockPermutation(
                _window_starts(self._packing.sequences, config.shuffle_window_sequences),
                1,
                seed=seed,
                purpose="sequences",
                permute_groups=False,  # documents are permuted already; distant sequences need no more
                blocks_held=2 * lanes + 16,
            )

    def rows(self, places: Places) -> list[Row | Unreadable]:
        """Read some sequences."""
        return [self._row(epoch, sequence) for epoch, sequence in zip(*map(np.ndarray.tolist, places), strict=True)]

    def fields(self, rows: Sequence[Row], places: Places) -> dict[str, Tensor]:
        """Return sequences as the fields of a batch."""
        tokens = np.empty((len(rows), self._length + 1), dtype=np.int64)
        documents = np.empty_like(tokens)
        for slot, row in enumerate(rows):
            tokens[slot], documents[slot] = row
        named = {"tokens": tokens, "documents": documents, "token_bytes": self._tokenizer.token_bytes[tokens]}
        return {name: torch.from_numpy(value) for name, value in named.items()}

    def prefetch(self, places: Places) -> None:
        """Begin to bring the shards of some sequences near."""
        pieces = (
            piece.document
            for epoch, sequence in zip(*map(np.ndarray.tolist, places), strict=True)
            for piece in self._packing.pieces(epoch, sequence)
        )
        self._members.prefetch(np.fromiter(pieces, dtype=np.int64))

    def _row(self, epoch: int, sequence: int) -> Row | Unreadable:
        tokens = np.empty(self._length + 1, dtype=np.int64)
        documents = np.empty_like(tokens)
        filled = 0
        for number, piece in enumerate(self._packing.pieces(epoch, sequence)):
            here = slice(filled, filled + piece.tokens)
            try:
                tokens[here] = self._members.read_tokens(self._extension, piece)
            except Unreadable as damage:
                return damage
            if tokens[here].max() >= self._tokenizer.vocabulary_size:
                return self._members.unreadable(piece.document, "it holds tokens beyond the vocabulary")
            documents[here] = number
            filled += piece.tokens
        assert filled == self._length + 1
        return tokens, documents


def _window_starts(sequences: int, window: int) -> np.ndarray:
    return np.minimum(np.arange(0, sequences + window, window, dtype=np.int64), sequences)
