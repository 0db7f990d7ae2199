"""Tokenizers in Hugging Face's ``tokenizer.json`` format: byte-level BPE, or SentencePiece's with ``▁`` for spaces.

The file becomes part of the data set that is built with it, and the manifest records its hash: whoever reads the tokens
decodes them by the very file that made them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from sixfold.errors import DataError, EnvironmentFault

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Engine

TOKENIZER_NAME = "tokenizer.json"
"""The file's name in a data set's folder, and the type in its manifest's record."""

ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "[EOS]")
"""What known vocabularies call the token that ends a document, in the order of preference."""

_SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class JsonTokenizer:
    """A tokenizer read from ``tokenizer.json``.

    Its special tokens stand for no bytes, and are never found in a text: where a document happens to spell one, it is
    encoded letter by letter.

    Args:
        content: the file.
        end_of_text: the special token that ends a document; None looks for one of ``ENDS_OF_TEXT``.
        where: the file's name, for errors.

    Raises:
        DataError: the file is no tokenizer, its tokens do not say which bytes they stand for, or it has no such token.
        EnvironmentFault: the package tokenizers is not installed.
    """

    def __init__(self, content: bytes, end_of_text: str | None = None, *, where: str = TOKENIZER_NAME) -> None:
        self.content = content
        self._engine = _read(content, where)
        self._engine.encode_special_tokens = True
        vocabulary = self._engine.get_vocab(with_added_tokens=True)
        self.vocabulary_size = max(vocabulary.values()) + 1
        self._name = _end_of_text(self._engine, end_of_text, where)
        self.end_of_text = vocabulary[self._name]
        self.token_bytes = np.zeros(self.vocabulary_size, dtype=np.int64)
        for number, length in _byte_counts(self._engine, vocabulary, json.loads(content), where):
            self.token_bytes[number] = length

    @classmethod
    def of_file(cls, path: Path, end_of_text: str | None = None) -> JsonTokenizer:
        """Read a ``tokenizer.json``, or the one in a folder.

        Raises:
            DataError: there is none; see also the class.
        """
        file = path / TOKENIZER_NAME if path.is_dir() else path
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError.of(
                f"the tokenizer cannot be read ({error.strerror})",
                where=str(file),
                allowed="bytes, characters, or the path of a tokenizer.json",
            ) from error
        return cls(content, end_of_text, where=str(file))

    def encode(self, text: str) -> Int64[np.ndarray, " n"]:
        """Return the token numbers of a text, without an end-of-text token."""
        return np.asarray(self._engine.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Return the text of token numbers; special tokens vanish, end of text among them."""
        return self._engine.decode(np.asarray(tokens).tolist(), skip_special_tokens=True)

    def description(self) -> dict[str, str]:
        """Return the manifest's record of this tokenizer."""
        return {
            "type": TOKENIZER_NAME,
            "sha256": hashlib.sha256(self.content).hexdigest(),
            "end_of_text": self._name,
        }


def _read(content: bytes, where: str) -> Engine:
    try:
        from tokenizers import Tokenizer as Engine
    except ImportError as error:
        raise EnvironmentFault.of(
            "reading a tokenizer.json needs the package tokenizers, which is not installed",
            where=where,
            fix='pip install "sixfold[tokenizers]"',
        ) from error
    try:
        return Engine.from_str(content.decode())
    except Exception as error:  # the package raises nothing narrower
        raise DataError.of(
            f"this is no tokenizer that can be read: {error}",
            where=where,
            allowed="a tokenizer.json as Hugging Face's tokenizers write it",
        ) from error


def _special(engine: Engine) -> dict[str, int]:
    return {token.content: number for number, token in engine.get_added_tokens_decoder().items() if token.special}


def _end_of_text(engine: Engine, asked: str | None, where: str) -> str:
    special = _special(engine)
    for name in ENDS_OF_TEXT if asked is None else (asked,):
        if name in special:
            return name
    raise DataError.of(
        "no special token is known to end a text" if asked is None else f"there is no special token {asked!r}",
        where=where,
        allowed=", ".join(special) or "none: the tokenizer has no special tokens",
        fix="name the token that ends a document with --end-of-text",
    )


def _byte_counts(
    engine: Engine, vocabulary: Mapping[str, int], record: Mapping[str, Any], where: str
) -> Iterator[tuple[int, int]]:
    """Yield (number, bytes of UTF-8 text) of every token; special ones stand for none.

    Byte-level vocabularies spell each byte as one letter. SentencePiece's spell a space as ``▁``, and bytes that have
    no letter as ``<0x0A>``. What joins pieces otherwise (WordPiece's ``##``) does not say how many bytes a piece is.
    """
    kinds = set(_decoder_kinds(record.get("decoder") or {}))
    if not kinds & {"ByteLevel", "Metaspace", "ByteFallback"}:
        raise DataError.of(
            f"the pieces of this tokenizer ({', '.join(sorted(kinds)) or 'no decoder'}) do not tell which bytes they "
            "stand for, so that bits per byte could not be measured",
            where=where,
            allowed="decoders with ByteLevel (GPT-2's kind of BPE), or Metaspace or ByteFallback (SentencePiece's)",
            fix="choose another tokenizer",
        )
    special = set(_special(engine).values())
    added = set(engine.get_added_tokens_decoder())
    for token, number in vocabulary.items():
        if number in special:
            yield number, 0
        elif number in added:
            yield number, len(token.encode())
        elif "ByteLevel" in kinds:
            yield number, len(token)
        elif _BYTE.fullmatch(token):
            yield number, 1
        else:
            yield number, len(token.replace(_SPACE, " ").encode())


def _decoder_kinds(decoder: Mapping[str, Any]) -> Iterator[str]:
    if "type" in decoder:
        yield decoder["type"]
    for part in decoder.get("decoders", ()):
        yield from _decoder_kinds(part)
