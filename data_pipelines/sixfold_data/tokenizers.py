"""Tokenizers: bytes, the characters of a corpus, and what a ``tokenizer.json`` defines.

In every vocabulary one token is *end of text*; it ends each document and stands for no bytes. The first two are defined
by the data set's manifest alone, and there it is the last; a ``tokenizer.json`` lies beside the manifest, which has its
hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from jaxtyping import Int64

from sixfold.errors import DataError
from sixfold_data.json_tokenizer import TOKENIZER_NAME, JsonTokenizer

if TYPE_CHECKING:
    from sixfold_data.store import Store


class Tokenizer(Protocol):
    """Text to token numbers and back.

    Attributes:
        vocabulary_size: number of tokens, end of text included.
        end_of_text: the token that ends a document.
        token_bytes: ``[vocabulary_size]``, how many bytes of UTF-8 text each token stands for.
    """

    vocabulary_size: int
    end_of_text: int
    token_bytes: Int64[np.ndarray, " vocabulary"]

    def encode(self, text: str) -> Int64[np.ndarray, " n"]:
        """Return the token numbers of a text, without an end-of-text token."""
        ...

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Return the text of token numbers; end-of-text tokens vanish."""
        ...

    def description(self) -> dict[str, str]:
        """Return the manifest's record of this tokenizer."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8 and end of text (256). Undecodable byte sequences decode to U+FFFD."""

    vocabulary_size = 257
    end_of_text = 256

    def __init__(self) -> None:
        self.token_bytes = np.concatenate([np.ones(256, dtype=np.int64), np.zeros(1, dtype=np.int64)])

    def encode(self, text: str) -> Int64[np.ndarray, " n"]:
        """Return the bytes of the text's UTF-8 form (lone surrogates, which have none, become ``?``)."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(np.int64)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Return the text of token numbers; end-of-text tokens vanish."""
        numbers = np.asarray(tokens, dtype=np.int64)
        return numbers[numbers < self.end_of_text].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def description(self) -> dict[str, str]:
        """Return the manifest's record of this tokenizer."""
        return {"type": "bytes"}


class CharacterTokenizer:
    """One token a character of a corpus, in code point order, and end of text.

    Args:
        characters: the vocabulary, each character once.
    """

    def __init__(self, characters: str) -> None:
        assert len(set(characters)) == len(characters), "a character occurs twice in the vocabulary"
        self.characters = characters
        self.vocabulary_size = len(characters) + 1
        self.end_of_text = len(characters)
        self._number = {character: number for number, character in enumerate(characters)}
        lengths = [len(character.encode()) for character in characters]
        self.token_bytes = np.asarray([*lengths, 0], dtype=np.int64)

    @classmethod
    def of_corpus(cls, texts: Iterable[str]) -> CharacterTokenizer:
        """Collect the vocabulary from all texts of a corpus (every split, so that each can be encoded)."""
        return cls("".join(sorted(set().union(*map(set, texts)))))

    def encode(self, text: str) -> Int64[np.ndarray, " n"]:
        """Return the token numbers of a text.

        Raises:
            DataError: the text holds a character that the corpus does not.
        """
        try:
            return np.fromiter((self._number[character] for character in text), dtype=np.int64, count=len(text))
        except KeyError as error:
            raise DataError.of(
                f"the character {error.args[0]!r} is not in the tokenizer's vocabulary",
                allowed=repr(self.characters),
                fix="leave the character out, or build the data set with the byte tokenizer",
            ) from error

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Return the text of token numbers; end-of-text tokens vanish."""
        return "".join(self.characters[token] for token in np.asarray(tokens).tolist() if token != self.end_of_text)

    def description(self) -> dict[str, str]:
        """Return the manifest's record of this tokenizer."""
        return {"type": "characters", "characters": self.characters}


def make_tokenizer(description: Mapping[str, str], store: Store) -> Tokenizer:
    """Make the tokenizer that the manifest of a data set in ``store`` records.

    Raises:
        DataError: the record names no known tokenizer, or its file is missing or another one.
        EnvironmentFault: a package is missing that reads it.
    """
    match description:
        case {"type": "bytes"}:
            return ByteTokenizer()
        case {"type": "characters", "characters": characters}:
            return CharacterTokenizer(characters)
        case {"type": "tokenizer.json", "sha256": sha256, "end_of_text": end_of_text}:
            return _json_tokenizer(store, sha256, end_of_text)
    raise DataError.of(
        f"unknown tokenizer {dict(description)}",
        allowed="type bytes, type characters with its characters, type tokenizer.json with sha256 and end_of_text",
        fix="build the data set again with `sixfold data build text`",
    )


def _json_tokenizer(store: Store, sha256: str, end_of_text: str) -> Tokenizer:
    content = store.read_file(TOKENIZER_NAME)
    where = f"{store.url}/{TOKENIZER_NAME}"
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError.of(
            "this is not the tokenizer that the data set was built with: its sha256 differs from the manifest's",
            where=where,
            fix="copy the data set again from its source, or build it again with the tokenizer that is meant",
        )
    return JsonTokenizer(content, end_of_text, where=where)


def storage_extension(vocabulary_size: int) -> str:
    """Return the member extension that stores tokens of a vocabulary: ``u16`` or ``u32`` (raw, little endian)."""
    return "u16" if vocabulary_size <= 1 << 16 else "u32"


STORAGE_DTYPES: dict[str, np.dtype[np.uint16] | np.dtype[np.uint32]] = {"u16": np.dtype("<u2"), "u32": np.dtype("<u4")}
"""dtype of stored tokens by member extension."""
